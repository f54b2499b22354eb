# SPDX-License-Identifier: Apache-2.0
"""A dense model becomes a mixture of copies of its feed-forward, whole or in segments, as it is or partly redrawn."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.ranges import SEEDS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.layers import dtype_name
from mindformers_ext.core.spec import MOST_EXPERTS, ModelSpec
from mindformers_ext.formats.dtypes import float_dtype
from mindformers_ext.jobs.experts.upcycle.card import card_of
from mindformers_ext.jobs.experts.upcycle.moe_layers import dense_layers
from mindformers_ext.jobs.experts.upcycle.request import (
    DROP,
    EXACT,
    GRANULAR,
    MINDSPORE,
    MOST_SPREAD,
    NO_STATES,
    NORMAL,
    ZEROS,
    Upcycled,
    UpcycleRequest,
    matrix_factors,
    whole_factor,
)
from mindformers_ext.jobs.experts.upcycle.router import RouterSizes, router_rows
from mindformers_ext.jobs.merge.course import Prepared, run_merge
from mindformers_ext.jobs.merge.models import Model, opened
from mindformers_ext.jobs.merge.moe import Recipe, prepared
from mindformers_ext.jobs.merge.moe_config import Expert, MoEConfig, Shuffle
from mindformers_ext.jobs.merge.moe_outputs import DENSE, NORMALISED, OUTPUTS, WHY_NOT, Output
from mindformers_ext.jobs.merge.output import OutputRequest, check_output
from mindformers_ext.jobs.merge.stream import Findings


def upcycle_dense(request: UpcycleRequest, out: OutputRequest, write: bool) -> Upcycled:
    """Write the mixture to ``out``, or with ``write`` false only check everything.

    Raises:
        UserError: anything wrong with options, model or output; nothing is left half-written.
    """
    facts: list[str] = []
    report = run_merge(out, _opened(request, out, facts), Findings(), write)
    return Upcycled(report, tuple(facts))


@contextmanager
def _opened(request: UpcycleRequest, out: OutputRequest, facts: list[str]) -> Iterator[Prepared]:
    _check_options(request)
    check_output(out, [request.model])
    name = str(request.model)
    with opened([name]) as models:
        model = models[name]
        dense = dense_layers(request.moe_layer_freq, model.layers)
        output = _output(request, model, dense)
        spec = model_spec_from_hf(model.config)
        _check_model(request, output, spec, dense)
        layers = tuple(layer for layer in range(model.layers) if layer not in dense)
        rows = router_rows(request, model, RouterSizes(layers, model.layers, spec.hidden_size, output.shared))
        recipe = Recipe(
            config=_config(request, output, dense),
            rows=lambda: (rows(), []),
            router=request.router,
            card=card_of(request, "dense model"),
            seed=request.seed,
        )
        job = prepared(recipe, models, out)
        facts += _facts(request, spec, output, len(layers), sum(math.prod(info.shape) for info in job.infos))
        yield job


def _check_options(request: UpcycleRequest) -> None:
    """What the options say against each other, all at once."""
    problems = Problems("the options")
    experts, granularity, chosen = request.experts, request.granularity, request.chosen
    if experts < 2:
        problems.add(f"--experts {experts}", "a mixture has at least two experts")
    if granularity < 1 or (request.method == GRANULAR and granularity < 2):
        problems.add(
            f"--granularity {granularity}",
            f"give into how many segments a copy is cut, with --method {GRANULAR} 2 or more",
        )
    elif experts % granularity:
        problems.add(
            f"--experts {experts} is no multiple of --granularity {granularity}",
            "experts are all segments of all copies",
        )
    elif not 1 <= chosen <= experts:
        problems.add(f"--top_k {chosen} of {experts} experts", "choose 1 to all of them")
    elif request.router == ZEROS and granularity > 1 and chosen < experts:
        problems.add(
            f"--router {ZEROS} with --granularity {granularity}",
            "among equal scores a runtime takes any segments, and they need not make up a whole: take groups",
        )
    elif request.router != NORMAL and chosen % granularity:
        problems.add(
            f"--top_k {chosen} is no multiple of --granularity {granularity}",
            f"segments of a copy have one score and are chosen together: take a multiple, or --router {NORMAL}",
        )
    if request.method == DROP and not 0 <= request.drop_ratio <= 1:
        problems.add(
            f"--drop_ratio {request.drop_ratio}", "give the share of neurons to redraw, 0 to 1 (published: 0.5)"
        )
    if not 0 < request.router_std <= MOST_SPREAD:
        problems.add(
            f"--router_std {request.router_std}", f"give a number above 0, up to {MOST_SPREAD:g}, or --router zeros"
        )
    if not 0 <= request.seed <= SEEDS:
        problems.add(f"--seed {request.seed}", f"give a whole number of 0 to {SEEDS}")
    if request.dtype is not None:
        float_dtype(request.dtype)
    problems.raise_if_any()


def _output(request: UpcycleRequest, model: Model, dense: Collection[int]) -> Output:
    """What is written: the format asked for, or the first that the model fits."""
    kind = model.architecture.model_type
    fits = [row for row in OUTPUTS if kind in row.fits]
    if not fits:
        advice = "--method expert makes more experts of it" if model.architecture.experts else "it fits no mixture here"
        raise UserError(f"'{model.folder}' is a {kind}: {WHY_NOT.get(kind, advice)}; {advice}")
    if request.form in (None, MINDSPORE):
        return next((row for row in fits if DENSE in row.config or not dense), fits[0])
    found = next((row for row in fits if row.kind == request.form), None)
    if found is None:
        kinds = ", ".join(row.kind for row in fits)
        raise UserError(f"--format {request.form}: a {kind} can become {kinds} ({WHY_NOT.get(kind, 'see its parts')})")
    return found


def _check_model(request: UpcycleRequest, output: Output, spec: ModelSpec, dense: Collection[int]) -> None:
    problems = Problems(f"'{request.model}' as a {output.kind}")
    if spec.sliding_window is not None:
        problems.add(f"sliding_window={spec.sliding_window}", "a mixture sees every token: set it to null in a copy")
    if spec.intermediate_size % request.granularity:
        problems.add(
            f"intermediate_size {spec.intermediate_size} is no multiple of {request.granularity}",
            "take another --granularity",
        )
    if dense and DENSE not in output.config:
        problems.add(
            "--moe_layer_freq leaves layers dense",
            f"a {output.name} has experts in every layer: take --format "
            + " or ".join(row.kind for row in OUTPUTS if DENSE in row.config),
        )
    if not request.normalised and NORMALISED not in output.config:
        problems.add("--norm_topk_prob False", f"a {output.name} always divides by the sum of the chosen weights")
    if spec.num_hidden_layers * request.experts > MOST_EXPERTS:
        problems.add(
            f"--experts {request.experts} in {spec.num_hidden_layers} layers",
            f"at most {MOST_EXPERTS} in all are built",
        )
    problems.raise_if_any()


def _config(request: UpcycleRequest, output: Output, dense: frozenset[int]) -> MoEConfig:
    """The mixture in the words of an assembly. A shared expert is the whole feed-forward behind a gate of zeros, which
    says one half; the routed ones give the other half."""
    model, granularity, half = str(request.model), request.granularity, 0.5 if output.shared else None
    factor = whole_factor(request.experts, request.chosen, granularity, request.normalised)
    return MoEConfig(
        base_model=model,
        experts=(Expert(model, residual_scale=half),) * (request.experts // granularity),
        gate_mode=request.router,
        dtype=dtype_name(request.dtype) if request.dtype else None,
        experts_per_token=request.chosen,
        text="",
        output=output,
        shared=(Expert(model),) * output.shared,
        segments=granularity,
        output_said=True,
        factors=matrix_factors(factor, request.scale),
        shuffle=Shuffle(request.drop_ratio, request.same_neurons) if request.method == DROP else None,
        dense=dense,
        normalised=request.normalised,
    )


def _facts(request: UpcycleRequest, spec: ModelSpec, output: Output, mixtures: int, parameters: int) -> Iterator[str]:
    granularity, chosen, experts = request.granularity, request.chosen, request.experts
    routed = mixtures * 3 * spec.hidden_size * spec.intermediate_size // granularity
    yield (
        f"{output.name}: {experts} experts ({experts // granularity} copies, each in {granularity} segment"
        f"{'s' * (granularity > 1)}) in {mixtures} of {spec.num_hidden_layers} layers, {chosen} chosen; a token passes "
        f"{(parameters - routed * (experts - chosen)) / 1e6:.1f} M of {parameters / 1e6:.1f} M parameters"
    )
    if output.shared:
        yield "the shared expert is the whole feed-forward at one half, the routed experts give the other half"
    yield "at the start: " + _begins(request)
    yield NO_STATES


def _begins(request: UpcycleRequest) -> str:
    """How the mixture's function begins beside the dense model's."""
    factor = whole_factor(request.experts, request.chosen, request.granularity, request.normalised)
    if request.method == DROP and request.drop_ratio > 0:
        return f"another function than the dense model's, as {request.drop_ratio:g} of the neurons are drawn anew"
    if request.scale != EXACT and factor != 1:
        return (
            f"not the dense model's function, as its gates are scaled by {factor ** (1 / 3):.4g} too "
            f"(SwiGLU is not linear in them); --scale {EXACT} keeps it"
        )
    if request.router == NORMAL and request.granularity > 1:
        return "not the dense model's function, as the segments of a copy are chosen apart; --router groups keeps it"
    if not request.normalised and request.router != ZEROS and request.chosen < request.experts:
        return (
            "not exactly the dense model's function, as the chosen weights have the right sum only where all scores "
            "are equal; --norm_topk_prob True keeps it"
        )
    return "the dense model's function, to rounding"
