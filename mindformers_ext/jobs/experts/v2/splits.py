# SPDX-License-Identifier: Apache-2.0
"""Scores to neuron indices by Gradient Split Plus: the step between the two that the published document leaves out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import refuse_existing
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.dense_model import open_dense
from mindformers_ext.jobs.experts.v2.layer_tables import (
    FORMATS,
    GATES,
    INDICES,
    RESIDUAL,
    SCORES,
    Layer,
    LayerTable,
    read_table,
    write_table,
)
from mindformers_ext.surgery.experts.gradient import CRITERIA
from mindformers_ext.surgery.experts.gradient_plus import plus_split


@dataclass(frozen=True, kw_only=True)
class PlusRequest:
    """What is asked for. ``experts`` None: one per cluster of the scores. ``size`` None: all neurons shared out over
    the routed experts and ``residual`` more, which every token passes."""

    model: Path
    scores: Path
    save_path: Path
    experts: int | None = None
    residual: int = 0
    size: int | None = None
    share: bool = False
    criterion: str = CRITERIA[0]
    fmt: str = "pt"
    overwrite: bool = False
    dry_run: bool = False

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.save_path / f"{INDICES}.{self.fmt}"

    def check(self) -> None:
        """``UserError`` lists options that do not fit."""
        problems = Problems("options")
        problems.one_of("--criterion", self.criterion, CRITERIA)
        problems.one_of("--format", self.fmt, FORMATS)
        if self.residual < 0:
            problems.add(f"--expert_num_residual {self.residual}", "give 1 or more, or leave it out")
        if self.size is not None:
            problems.positive("--expert_size", self.size)
        problems.raise_if_any()


def write_split(request: PlusRequest, tell: Callable[[str], object] = lambda line: None) -> LayerTable:
    """Write the file of neurons, but with ``dry_run``.

    Raises:
        UserError: options, scores or a model that do not fit; a file that exists.
    """
    request.check()
    refuse_existing(request.path, request.overwrite)
    table = read_table(request.scores, SCORES)
    with closing(open_dense(request.model)) as model:
        weights, spec = fingerprint(model.reader), model.spec
    table.check_made_from(model=weights)
    layers: dict[int, Layer] = {}
    for layer in range(spec.num_hidden_layers):
        if layer not in table.layers:
            raise UserError(f"'{table.path}' lacks layer {layer}: give the scores of this model")
        layers[layer] = _split(request, table, layer, spec.intermediate_size, tell)
    about = {SCORES: table.digest, "criterion": request.criterion, "share_neurons": request.share}
    about |= {name: table.about[name] for name in ("model", GATES) if name in table.about}
    made = LayerTable(INDICES, layers, about, request.path)
    if not request.dry_run:
        write_table(request.path, made, request.overwrite)
    return made


def _split(request: PlusRequest, table: LayerTable, layer: int, width: int, tell: Callable[[str], object]) -> Layer:
    where, rows = f"'{table.path}', layer {layer}", table.layers[layer]
    if request.experts not in (None, len(rows)):
        raise UserError(f"{where} has {len(rows)} clusters, --num_experts is {request.experts}: an expert per cluster")
    scores = np.stack([rows[str(number)] for number in range(len(rows))])
    if scores.shape[1] != width:
        raise UserError(f"{where} has scores of {scores.shape[1]} neurons, the model {width}: give those of this model")
    zero = np.flatnonzero(~scores.any(1)).tolist()
    if zero:
        tell(f"warning: layer {layer}: the scores of clusters {zero} are all 0")
    size = request.size or width // (len(rows) + request.residual)
    split = plus_split(scores, size, request.residual, request.share, request.criterion)
    always = {RESIDUAL: np.concatenate(split.residual)} if split.residual else {}
    return always | {str(number): ids for number, ids in enumerate(split.experts)}
