# SPDX-License-Identifier: Apache-2.0
"""The YAML of continued pretraining, from that of the run that pruned: new sizes, new weights, the last proportions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.mixture_words import MIXTURE, with_mixture_words
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.data.mixture.state import MixtureState, state_from_json
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.prune.trained import TrainedRun, opened
from mindformers_ext.jobs.run.mixture_checks import DATA, STATE

SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class NextStage:
    """Its content, and what was filled in."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def next_yaml(run: TrainedRun, shape: ModelShape, weights: Path) -> NextStage:
    """The run's YAML without masks, at the pruned sizes, starting from ``weights`` and the last proportions."""
    config, notes = _filled(run.config, shape, weights)
    for section in ("train_dataset", "train_dataset_task.dataset_config"):
        loader = section_at(config, f"{section}.data_loader")
        last = _last_state(run) if isinstance(loader, dict) and loader.get("type") == MIXTURE else None
        if last is not None and isinstance(loader, dict):
            shares = dict(zip(last.names, last.proportions, strict=True))
            loader["proportion"] = shares if isinstance(loader.get("proportion"), dict) else list(last.proportions)
            if section == "train_dataset":
                notes.append("proportion: the run's last, " + ", ".join(f"{n} {p:.4f}" for n, p in shares.items()))
    return NextStage(config, tuple(notes))


def next_from_yaml(given: Mapping[str, Any], shape: ModelShape, weights: Path) -> NextStage:
    """The training YAML of the dense model at the pruned sizes, starting from ``weights``.

    Raises:
        UserError: it describes no model, or a mixture of experts.
    """
    model = given.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("model_config"), dict):
        raise UserError("--train_yaml has no model.model_config: give the YAML of a training run of the dense model")
    if network_spec_from_yaml(with_mixture_words(given), 1).model.moe:
        raise UserError("--train_yaml is of a mixture of experts: give the YAML of a training run of the dense model")
    config, notes = _filled(given, shape, weights)
    return NextStage(config, tuple(notes))


def _filled(given: Mapping[str, Any], shape: ModelShape, weights: Path) -> tuple[dict[str, Any], list[str]]:
    config = copy.deepcopy(dict(given))
    words = config["model"]["model_config"]
    words.pop("l0_module", None)
    words |= {word: getattr(shape, name) for word, name in SIZES.items()}
    config |= {"load_checkpoint": str(weights), "resume_training": False}
    config["output_dir"] = str(config.get("output_dir") or "./output").rstrip("/") + "_continued"
    return config, [f"sizes and load_checkpoint are filled in; output_dir is {config['output_dir']}"]


def _last_state(run: TrainedRun) -> MixtureState | None:
    """Where the run's mixture stood; None where its checkpoint does not tell."""
    with opened(run) as reader:
        name = DATA + STATE
        if name not in reader.infos:
            return None
        text = np.asarray(reader.read(name)).astype(np.uint8).tobytes().decode("utf-8", "replace")
    return state_from_json(text, str(run.file))


def write_next(path: Path, stage: NextStage, overwrite: bool) -> None:
    """Write the YAML whole."""
    with fresh_file(path, overwrite) as partial:
        partial.write_text(dump_yaml(stage.config), encoding="utf-8")
