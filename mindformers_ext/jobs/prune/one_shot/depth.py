# SPDX-License-Identifier: Apache-2.0
"""Leave whole layers out of a dense model in one shot: those that change least, or whose loss is least missed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.jobs.experts.probe import Tell
from mindformers_ext.jobs.experts.text_domains import limited
from mindformers_ext.jobs.prune.one_shot.cuts import (
    MAGNITUDE,
    Cut,
    OneShotReport,
    Values,
    Workbench,
    carry_out,
    chosen_by,
)
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance
from mindformers_ext.jobs.prune.one_shot.request import INFLUENCE, PERPLEXITY, DepthRequest
from mindformers_ext.jobs.prune.one_shot.skipping import Order, removal_order
from mindformers_ext.jobs.prune.one_shot.targets import fewer_layers
from mindformers_ext.jobs.prune.quality import RANDOM


def prune_depth(request: DepthRequest, tell: Tell = lambda line: None) -> OneShotReport:
    """Write the model without the layers that the measure misses least; errors as ``carry_out``."""

    def aim(bench: Workbench) -> ModelShape:
        count = bench.shape.num_hidden_layers
        keep = request.keep
        if request.fewer_parameters is not None:
            keep = fewer_layers(bench.dense.model, request.fewer_parameters)
        if keep is None or not 0 < keep < count:
            raise UserError(f"--keep {keep}: the model has {count} layers, give 1 to {count - 1}")
        return replace(bench.shape, num_hidden_layers=keep)

    def choose(bench: Workbench, found: Importance, target: ModelShape) -> dict[str, Cut]:
        own = layers_by(bench, request.method, found, target, request, tell)
        cuts = {request.method: Cut(own)}
        return cuts | {
            other: Cut(chosen_by(bench, other, found, target, request.seed)) for other in (MAGNITUDE, RANDOM)
        }

    request.check()
    return carry_out(request, tell, ("forward",), aim, choose)


def layers_by(
    bench: Workbench, method: str, found: Importance, target: ModelShape, request: DepthRequest, tell: Tell
) -> Values:
    """The mask of layers by "bi" or "ppl"."""
    if method == INFLUENCE:
        return chosen_by(bench, "minitron", found, target, request.seed)
    order = order_of(bench, found, target, request.importance_path, request.order_tokens, request.remake, tell)
    mask = np.ones(bench.shape.num_hidden_layers)
    mask[list(order.layers)] = 0.0
    return {"layer": mask}


def order_of(
    bench: Workbench,
    found: Importance,
    target: ModelShape,
    path: Path,
    tokens: int,
    remake: bool,
    tell: Tell,
) -> Order:
    """Which layers go first by "ppl"; kept in a file beside that of what was measured."""
    course = replace(bench.start.measured, rows=limited(bench.start.measured.rows, tokens))
    course = replace(course, batch=len(course.rows.ids))
    count = bench.shape.num_hidden_layers - target.num_hidden_layers
    file, folder = path.with_suffix(f".{PERPLEXITY}.json"), bench.scratch / PERPLEXITY
    folder.mkdir(exist_ok=True)
    return removal_order(course, file, found.about, count, folder, remake, tell)
