# SPDX-License-Identifier: Apache-2.0
"""What each layer of a dense model adds, by channel: mean and variance over tokens, for ``align``.

One pass with one layer in memory; every token counts that is no padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.formats.atomic import fresh_file, refuse_existing
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.calibration import opened
from mindformers_ext.jobs.experts.probe import TOKENS, Part, Tell, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import alone
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.jobs.experts.v2.layer_tables import DISTRIBUTION, MOMENTS, PARTS, LayerTable, write_table
from mindformers_ext.jobs.experts.v2.table_request import TableRequest
from mindformers_ext.surgery.experts.alignment import Moments

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
                self.found[name] = self.found[name].merged(new) if name in self.found else new

    def end(self, layer: int) -> None:
        """Keep them."""
        if self.folder is None:
            return
        arrays: dict[str, Any] = as_arrays(self.found)
        with fresh_file(part_of(self.folder, layer), overwrite=True) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)
        self.found = {}


def part_of(folder: Path, layer: int) -> Path:
    """Where a layer's moments lie until all are there."""
    return folder / f".distribution_{layer}.npz"


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
        spec, folder = start.model.spec, request.save_path
        layers = range(spec.num_hidden_layers)
        sink = MomentsSink(PARTS, spec.hidden_size, folder)
        wanted = needs(start.course, sink, len(layers), backward=False)
        memory = f"memory about {wanted.memory / 1e9:.2f} GB, for any number of layers"
        for line in (*start.notes, f"{start.rows} rows, {start.tokens} tokens; {memory}"):
            tell(line)
        if request.dry_run:
            return None
        check_needs(wanted, folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"model": fingerprint(start.model.reader), "texts": start.every.digest("")}
        digest = sha256(json.dumps([about, request.calibration.computed()], sort_keys=True).encode()).hexdigest()
        place = folder / ".states_distribution"
        states = States(place, start.course.length, spec.hidden_size, digest, keep=False, anew=request.overwrite)
        forward(start.course, states, sink, layers)
        table = LayerTable(
            DISTRIBUTION, {layer: _read(part_of(folder, layer)) for layer in layers}, about, request.path
        )
        write_table(request.path, table, request.overwrite)
        states.remove()
        clean(request)
        return table


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in found.items()}


def clean(request: DistributionRequest) -> None:
    """Delete what a killed run may have left beside the file."""
    remove_left(request.save_path / ".states_distribution")
    for path in request.save_path.glob(".distribution_*.npz"):
        path.unlink()
