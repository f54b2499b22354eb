# SPDX-License-Identifier: Apache-2.0
"""What each layer of a dense model adds, by channel: mean and variance over tokens, for ``align``.

One pass with one layer in memory; every token counts that is no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_file, refuse_existing
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.calibration import opened
from mindformers_ext.jobs.experts.probe import TOKENS, Part, Tell, check_needs, needs
from mindformers_ext.jobs.experts.ranks import alone
from mindformers_ext.jobs.experts.v2.layer_tables import DISTRIBUTION, MOMENTS, PARTS, LayerTable
from mindformers_ext.jobs.experts.v2.table_stage import TableRequest, table_by_pass
from mindformers_ext.surgery.experts.alignment import Moments

PART = ".distribution_{}.npz"  # a layer's moments, until all are there
POINT = dict(zip(PARTS, ("attention_output", "mlp_output"), strict=True))  # where a part's output is seen


@dataclass(frozen=True, kw_only=True)
class DistributionRequest(TableRequest):
    """What is asked for."""

    KIND = DISTRIBUTION


@dataclass
class MomentsSink:
    """Moments of a layer's ``parts`` (``jobs.experts.probe.Sink``). ``folder``: where a layer's are kept; None: in
    ``found`` alone."""

    parts: tuple[str, ...]
    width: int
    folder: Path | None = None
    gradients: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    nbytes: int = 0
    found: dict[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = tuple(POINT[part] for part in self.parts)
        self.nbytes = 8 * self.width * (4 * len(self.parts) + 2 * TOKENS)  # moments, and tokens in float64

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Add the part's tokens."""
        for name in self.parts:
            x = values[POINT[name]]
            if len(x):
                new = Moments.of(x)
                if not np.isfinite(new.variance).all():
                    raise UserError(
                        f"layer {layer}, {name} gives values that are no numbers: check the model's weights"
                    )
                self.found[name] = self.found[name].merged(new) if name in self.found else new

    def end(self, layer: int) -> None:
        """Keep them."""
        if self.folder is None:
            return
        arrays: dict[str, Any] = as_arrays(self.found)
        with fresh_file(self.folder / PART.format(layer), overwrite=True) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)
        self.found = {}


def as_arrays(found: Mapping[str, Moments]) -> dict[str, np.ndarray]:
    """A layer of the table."""
    return {
        f"{part}.{name}": np.asarray(value)
        for part, moments in found.items()
        for name, value in zip(MOMENTS, (np.array([moments.number]), moments.mean, moments.variance), strict=True)
    }


def write_distribution(request: DistributionRequest, tell: Tell = lambda line: None) -> LayerTable | None:
    """Write the file, None with ``dry_run``. A killed run goes on where it was.

    Raises:
        UserError: options, texts or a model that do not fit; too little memory or disk; a file that exists.
    """
    request.check()
    share = alone("distributions are measured")
    refuse_existing(request.path, request.overwrite)
    with opened(request.calibration, share, not request.dry_run) as start:
        if start.tokens < 2:
            raise UserError("one token has no variance: give more text, or more --max_tokens")
        spec, folder = start.model.spec, request.save_path
        sink = MomentsSink(PARTS, spec.hidden_size, folder)
        wanted = needs(start.course, sink, spec.num_hidden_layers, backward=False)
        memory = f"memory about {wanted.memory / 1e9:.2f} GB, for any number of layers"
        for line in (*start.notes, f"{start.rows} rows, {start.tokens} tokens; {memory}"):
            tell(line)
        if request.dry_run:
            return None
        check_needs(wanted, folder)
        about = {"model": fingerprint(start.model.reader), "texts": start.every.digest("")}
        return table_by_pass(request, start, sink, about, PART, _read)


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in found.items()}
