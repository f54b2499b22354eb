# SPDX-License-Identifier: Apache-2.0
"""Generalised task arithmetic: what task_arithmetic, ties, dare, breadcrumbs and della have in common.

With task vectors d_m = x_m - b and their sparsified form s_m (each method its own way, optionally rescaled):
    D_m = w_m s_m
    without election:  delta = sum_m D_m,               div = sum_m w_m
    with election:     S = +1 where sum_m D_m >= 0, else -1
                       delta = sum over the m with sign(D_m) = S of D_m,  div = the sum of their w_m
    out = b + lambda * delta / div       (the division with ``normalize`` only)
Exact zeros have no sign and leave the mean. Everything happens in the merge's type, so that weights and sums round as
they do in mergekit; sums over models accumulate in float32. Sources: Ilharco et al. 2022, arXiv 2212.04089 (task
arithmetic); Yadav et al. 2023, arXiv 2306.01708 (election of signs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mindformers_ext.surgery.merge.bits import kept, nonzero, one_for_zero, same_sign
from mindformers_ext.surgery.merge.settings import Parameter, Settings
from mindformers_ext.surgery.merge.stream import Chunk, Stream, need_base

# One sparsifier walks once through a tensor's chunks, in order: (number of the model, first element, task vector).
Sparsify = Callable[[int, int, torch.Tensor], torch.Tensor]
# Finds what it needs in the stream, and then gives a fresh sparsifier for every walk.
Prepare = Callable[[Stream, Settings], Callable[[], Sparsify]]

NO_SUM = 1e-8  # weights that cancel out are not divided by
NO_LENGTH = 1e-7  # task vectors shorter than this (sum of magnitudes) are not rescaled

WEIGHT = Parameter("weight", per_input=True)
DENSITY = Parameter("density", 1.0, per_input=True, low=0.0, high=1.0)


def task_parameters(normalize: bool, rescale: bool | None, *own: Parameter) -> tuple[Parameter, ...]:
    """The parameters of the family; ``rescale`` None: the method knows none."""
    common = (WEIGHT, *own, Parameter("normalize", normalize), Parameter("lambda", 1.0), Parameter("int8_mask", False))
    return common if rescale is None else (*common, Parameter("rescale", rescale))


def task_vectors(chunk: Chunk) -> list[torch.Tensor]:
    """x_m - b of every input."""
    base = need_base(chunk)
    return [tensor - base for tensor in chunk.inputs]


def merge_task_vectors(
    stream: Stream, settings: Settings, prepare: Prepare | None = None, elect: bool = False
) -> Iterator[torch.Tensor]:
    """Chunks of the merged tensor, in the type of the inputs."""
    fresh = prepare(stream, settings) if prepare else None
    factors = _factors(stream, settings, fresh)
    weights, sparsify = settings.each("weight"), fresh() if fresh else None
    factor = settings.number("lambda")
    for chunk in stream.chunks():
        base, deltas = need_base(chunk), task_vectors(chunk)
        if sparsify:
            deltas = [sparsify(number, chunk.start, delta) for number, delta in enumerate(deltas)]
        for delta, scale in zip(deltas, factors, strict=True):
            if scale != 1.0:
                delta.mul_(scale)
        scales = [torch.tensor(weight, dtype=base.dtype, device=base.device) for weight in weights]
        terms = [delta.mul_(weight) for delta, weight in zip(deltas, scales, strict=True)]
        delta = _elected(terms, scales, settings.on("normalize")) if elect else _plain(terms, scales, settings)
        if factor != 1.0:
            delta = delta * factor
        yield base + delta


def _plain(terms: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], settings: Settings) -> torch.Tensor:
    delta = added(terms)
    if not settings.on("normalize"):
        return delta
    total = added(weights)
    return delta if abs(float(total)) < NO_SUM else delta / total


def _elected(terms: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], normalize: bool) -> torch.Tensor:
    total = added(terms)  # of sign -0.0 only where every term is a zero, which changes nothing
    chosen = [kept(term, same_sign(term, total)) for term in terms]
    delta = added(chosen)
    if not normalize:
        return delta
    shares = [kept(weight.expand_as(term), nonzero(term)) for term, weight in zip(chosen, weights, strict=True)]
    return delta / one_for_zero(added(shares))


def added(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, accumulated in float32 and rounded once to the type of the terms."""
    if len(terms) == 1:
        return terms[0]
    if len(terms) == 2 or terms[0].dtype in (torch.float32, torch.float64):
        total = terms[0] + terms[1]  # one addition rounds as the long way does
        for term in terms[2:]:
            total += term
        return total
    wide = terms[0].to(torch.float32)
    for term in terms[1:]:
        wide = wide.add_(term)
    return wide.to(terms[0].dtype)


def _factors(stream: Stream, settings: Settings, fresh: Callable[[], Sparsify] | None) -> list[float]:
    """What brings each sparsified task vector back to its length: the quotient of L1 norms, or 1 / density."""
    ones = [1.0] * stream.inputs
    if fresh is None or not settings.shared.get("rescale", False):
        return ones
    if settings.rescale_mode == "density":
        return [1.0 / density if density > 0 else 1.0 for density in settings.each("density")]
    before, after = [0.0] * stream.inputs, [0.0] * stream.inputs
    sparsify = fresh()
    for chunk in stream.chunks():
        for number, delta in enumerate(task_vectors(chunk)):
            before[number] += _length(delta)
            after[number] += _length(sparsify(number, chunk.start, delta))
    return [old / new if old >= NO_LENGTH and new >= NO_LENGTH else 1.0 for old, new in zip(before, after, strict=True)]


def _length(tensor: torch.Tensor) -> float:
    """The sum of magnitudes: float32 within a row, float64 between rows."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return float(tensor.abs().sum(dim=-1, dtype=wide).to(torch.float64).sum())
