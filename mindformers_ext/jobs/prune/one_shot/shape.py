# SPDX-License-Identifier: Apache-2.0
"""Cut a dense model to a smaller shape in one shot: fewer neurons, heads, channels, layers of it."""

from __future__ import annotations

from dataclasses import replace

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.jobs.experts.probe import Tell
from mindformers_ext.jobs.prune.one_shot.cuts import (
    MAGNITUDE,
    Cut,
    OneShotReport,
    Workbench,
    carry_out,
    chosen_by,
)
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance
from mindformers_ext.jobs.prune.one_shot.request import ShapeRequest
from mindformers_ext.jobs.prune.one_shot.targets import AXES, target_of, with_fewer
from mindformers_ext.jobs.prune.quality import RANDOM
from mindformers_ext.surgery.prune.importance import METHODS
from mindformers_ext.surgery.prune.least_squares import NONE

FLAP, BIAS = "flap", "flap + bias"


def prune_shape(request: ShapeRequest, tell: Tell = lambda line: None) -> OneShotReport:
    """Write the model with the units that the measure finds best; errors as ``carry_out``."""

    def aim(bench: Workbench) -> ModelShape:
        if request.fewer_parameters is None:
            target = target_of(request.sizes, bench.shape)
        else:
            target = with_fewer(bench.dense.model, request.fewer_parameters, request.axes or AXES[:1])
        check_method(request, bench, target)
        return target

    def choose(bench: Workbench, found: Importance, target: ModelShape) -> dict[str, Cut]:
        return cuts_of(request, bench, found, target)

    request.check()
    return carry_out(request, tell, METHODS[request.method].needs, aim, choose)


def check_method(request: ShapeRequest, bench: Workbench, target: ModelShape) -> None:
    """``UserError`` where the measure does not know what is to go, or the family has no bench for a bias."""
    if request.method == FLAP and target.hidden_size != bench.shape.hidden_size:
        raise UserError("--method flap knows neurons, heads and layers, no hidden_size: leave it out, or use minitron")
    if request.bias and not has_biases(bench):
        raise UserError(f"--bias: {bench.dense.model.model_type} has no mlp_bias in config.json: leave --bias out")
    outer = {name: getattr(target, name) for name in ("hidden_size", "num_hidden_layers")}
    if target == replace(bench.shape, **outer) and (request.bias or request.refit != NONE):
        raise UserError("--refit and --bias make up for neurons and heads, and none of them goes: leave them out")


def has_biases(bench: Workbench) -> bool:
    """Whether config.json of the family can say that output matrices have biases."""
    return {"mlp_bias", "attention_bias"} <= {word.key for word in bench.dense.model.family_row.words}


def cuts_of(request: ShapeRequest, bench: Workbench, found: Importance, target: ModelShape) -> dict[str, Cut]:
    """The cut that is asked for first, then the same without refit or bias, magnitude, and one drawn at random."""
    method, seed = request.method, request.seed
    own = chosen_by(bench, method, found, target, seed)
    cuts: dict[str, Cut] = {}
    if request.refit != NONE:
        cuts[f"{method} + {request.refit}"] = bench.cut(own, request.refit)
    if request.bias:
        cuts[BIAS] = bench.cut(own, bias=found)
    cuts[method] = bench.cut(own)
    if method == FLAP and has_biases(bench) and {*own} != {"layer"}:
        cuts.setdefault(BIAS, bench.cut(own, bias=found))
    for other in (MAGNITUDE, RANDOM):
        cuts.setdefault(other, bench.cut(chosen_by(bench, other, found, target, seed)))
    return cuts
