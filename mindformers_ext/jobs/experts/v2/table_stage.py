# SPDX-License-Identifier: Apache-2.0
"""A stage that runs texts through a dense model and writes a file of a value per layer: its request and its pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from mindformers_ext.core.errors import Problems
from mindformers_ext.jobs.experts.calibration import Calibration, Opened
from mindformers_ext.jobs.experts.probe import Sink, forward
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.jobs.experts.v2.layer_tables import FORMATS, Layer, LayerTable, write_table


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """``KIND``: of the table, after which the file is called; ``fmt``: of the file."""

    KIND: ClassVar[str]
    calibration: Calibration
    save_path: Path
    fmt: str = "pt"
    overwrite: bool = False
    dry_run: bool = False

    def collect(self, problems: Problems) -> None:
        """Add options that do not fit."""
        problems.one_of("--format", self.fmt, FORMATS)

    def check(self) -> None:
        """``UserError`` lists options that do not fit."""
        problems = Problems("options")
        self.collect(problems)
        problems.raise_if_any()
        self.calibration.check()

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.save_path / f"{self.KIND}.{self.fmt}"


def table_by_pass(
    request: TableRequest,
    start: Opened,
    sink: Sink,
    about: Mapping[str, Any],
    part: str,
    read: Callable[[Path], Layer],
) -> LayerTable:
    """Write the file from one pass forward through all layers, whose values the sink leaves in files of their own. A
    killed run goes on where it was; nothing is left beside the file.

    Args:
        request: checked; nothing stands in the way.
        start: the model and its rows.
        sink: writes ``part``, with a layer's number in it, when the layer ends.
        about: what the values are made from.
        part: the name of a layer's own file, ".gate_{}.npy".
        read: the values in one of them.
    """
    folder, spec = request.save_path, start.model.spec
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256(json.dumps([about, request.calibration.computed()], sort_keys=True).encode()).hexdigest()
    place, layers = folder / f".states_{request.KIND}", range(spec.num_hidden_layers)
    states = States(place, start.course.length, spec.hidden_size, digest, keep=False, anew=request.overwrite)
    forward(start.course, states, sink, layers)
    values = {layer: read(folder / part.format(layer)) for layer in layers}
    table = LayerTable(request.KIND, values, about, request.path)
    write_table(request.path, table, request.overwrite)
    states.remove()
    remove_left(place)
    for path in folder.glob(part.format("*")):
        path.unlink()
    return table
