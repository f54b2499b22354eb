# SPDX-License-Identifier: Apache-2.0
"""What a mixture is made of, read from the folders that the stages before have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_json
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.gate_files import read_gates
from mindformers_ext.jobs.experts.gating import PRESETS, Gating, preset, read_factors
from mindformers_ext.jobs.experts.splits import read_splits
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import WEIGHTS

FACTORS = "score_scale_factors.txt"


@dataclass(frozen=True)
class Parts:
    """Splits and gates by layer (no gates: random ones), and how experts are chosen and weighed."""

    splits: Mapping[int, LayerSplit]
    gates: Mapping[int, Mapping[str, np.ndarray]] | None
    gating: Gating


@dataclass(frozen=True, kw_only=True)
class PartsRequest:
    """Where the parts lie. ``own``: fields of ``Gating`` that replace the preset's; ``preset`` None: by the gates."""

    model: Path
    split: Path | None
    gates: Path | None
    templates: str
    experts: int
    chosen: int
    preset: str | None = None
    network: str | None = None
    factors: Path | None = None
    own: Mapping[str, Any]
    allow_pickle: bool = False


def read_parts(request: PartsRequest) -> Parts:
    """Read all of it.

    Raises:
        UserError: a folder or a layer is missing, or does not fit.
    """
    if request.split is None:
        raise UserError("--split_file_path is missing: give the folder that split has written")
    if not 1 <= request.chosen <= request.experts:
        raise UserError(f"--num_selects {request.chosen} of {request.experts} experts: choose 1 to all of them")
    layers, width = model_sizes(request.model)
    splits = read_splits(request.split, request.templates, layers, request.experts, request.allow_pickle, width)
    gates = read_gates(request.gates, request.templates, layers, request.allow_pickle) if request.gates else None
    own = {name: value for name, value in request.own.items() if value is not None}
    fields = preset(request.preset or preset_for(gates is not None), request.experts, request.chosen)
    if request.factors is not None:
        fields["factors"] = _factor_file(request.factors, layers)
    if request.factors is not None and "factors" in own:
        raise UserError("--score_scale_factor and --score_scale_factor_file_path say the same: give one of them")
    if "factors" in own:
        own["factors"] = read_factors(own["factors"], layers)
    first = gates[0] if gates else {}
    fitted = next((kind for kind, names in WEIGHTS.items() if first and set(names) <= set(first)), "mlp")
    return Parts(splits, gates, Gating(chosen=request.chosen, network=request.network or fitted, **(fields | own)))


def read_own_splits(
    model: Path, split: Path | None, templates: str, allow_pickle: bool
) -> dict[int, LayerSplit] | None:
    """The splits of a mixture from a folder, where one is given."""
    if split is None:
        return None
    layers, width = model_sizes(model)
    return read_splits(split, templates, layers, None, allow_pickle, width)


def model_sizes(model: Path) -> tuple[int, int]:
    """Layers and neurons that config.json tells."""
    config = read_config(model)
    layers, width = config.get("num_hidden_layers"), config.get("intermediate_size")
    if type(layers) is not int or type(width) is not int or min(layers, width) < 1:
        raise UserError(f"config.json of '{model}' lacks num_hidden_layers or intermediate_size: copy it again")
    return layers, width


def preset_for(fitted: bool) -> str:
    """The preset where none is asked for: fitted gates choose neurons as they are, random ones must be trained."""
    return PRESETS[0] if fitted else PRESETS[1]


def _factor_file(folder: Path, layers: int) -> float | tuple[float, ...]:
    """The factors of ``score_scale_factors.txt``, a list as Python and JSON write it."""
    path = folder / FACTORS if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: give the folder that holds {FACTORS}")
    return read_factors(read_json(path, "expected a list of numbers, one for each layer"), layers)
