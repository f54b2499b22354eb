# SPDX-License-Identifier: Apache-2.0
"""multislerp: the weighted mean of directions on a sphere, with the weighted mean of lengths; with a base, of their
task vectors.

    n_m = |x_m|,  u_m = x_m / (n_m + eps),  out = (sum_m w_m n_m) * s / |s|  with  s = sum_m w_m u_m
mergekit's formula goes on from s / |s| by the weighted mean of the directions' tangents there. That mean is
s - (s . s / |s|) s / |s|, zero for any weights, so the point stays. Source: Goddard 2025, goddard.blog, "multislerp".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import inner, wide
from mindformers_ext.surgery.merge.stream import Chunk, Stream

TINY = 1e-8  # weights that cancel out are not divided by
NOISE = 1e-6  # a mean direction shorter than this is what float32 rounds


def multislerp(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the mean, in the type of the inputs; sums in float32."""
    if stream.inputs == 1:
        yield from (chunk.inputs[0] for chunk in stream.chunks())
        return
    weights = settings.each("weight")
    if settings.on("normalize_weights") and abs(sum(weights)) > TINY:
        weights = [weight / sum(weights) for weight in weights]
    factors = _factors(stream, weights, settings.number("eps"))
    for chunk in stream.chunks():
        mean = _mixed(_vectors(chunk), factors)
        out = mean if chunk.base is None else wide(chunk.base) + mean
        yield out.to(chunk.inputs[0].dtype)


def _vectors(chunk: Chunk) -> list[torch.Tensor]:
    vectors = [wide(tensor) for tensor in chunk.inputs]
    return vectors if chunk.base is None else [vector - wide(chunk.base) for vector in vectors]


def _mixed(vectors: list[torch.Tensor], factors: list[float]) -> torch.Tensor:
    total = vectors[0] * factors[0]
    for vector, factor in zip(vectors[1:], factors[1:], strict=True):
        total = torch.add(total, vector, alpha=factor)
    return total


def _factors(stream: Stream, weights: list[float], eps: float) -> list[float]:
    """What each vector is multiplied by."""
    squares = [0.0] * stream.inputs
    for chunk in stream.chunks():
        for number, vector in enumerate(_vectors(chunk)):
            squares[number] += inner(vector, vector)
    norms = [math.sqrt(square) for square in squares]
    shares = [weight / (norm + eps) for weight, norm in zip(weights, norms, strict=True)]
    square = 0.0
    for chunk in stream.chunks():
        mean = _mixed(_vectors(chunk), shares)
        square += inner(mean, mean)
    length = math.sqrt(square)
    if length >= max(eps, NOISE * sum(map(abs, weights))):
        scale = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / length
        return [scale * share for share in shares]
    if stream.inputs == 2 or not any(norms):  # two opposite ones have a straight line between them
        return list(weights)
    raise UserError(
        f"multislerp: the weighted directions of the models cancel out in '{stream.name}': use other weights, or linear"
    )


MULTISLERP = Method(
    "multislerp",
    multislerp,
    (Parameter("weight", per_input=True), Parameter("normalize_weights", True), Parameter("eps", 1e-8, low=0.0)),
    base="optional",
)
