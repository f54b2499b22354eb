# SPDX-License-Identifier: Apache-2.0
"""nuslerp: slerp of two models by weights, t = w2 / (w1 + w2); with a base, of their task vectors.

The angle is that of the whole tensor (``nuslerp_flatten``, the default), or of each row, or of each column
(``nuslerp_row_wise`` false and true, as mergekit names them: its "rows" run along dimension 0). Source: Shoemake 1985.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import SMALL_NORM, inner, mixed, shares, wide
from mindformers_ext.surgery.merge.stream import Chunk, Stream

TINY = 1e-6  # weights that cancel out give the middle
PARALLEL = 1 - 1e-8  # |cos| above this: the straight line; much nearer to 1 than slerp's


def nuslerp(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks on the way from the first to the second input."""
    first, second = settings.each("weight")
    t = second / (first + second) if abs(first + second) >= TINY else 0.5
    flat = settings.on("nuslerp_flatten") or stream.shape[0] == 1
    numbers = _whole(stream, t) if flat else None
    columns = _columns(stream, t) if not flat and settings.on("nuslerp_row_wise") else None
    for chunk in stream.chunks():
        one, two = _pair(chunk)
        if numbers:
            merged = mixed(one, two, numbers)
        else:
            a, b = columns or _many(t, *(x.unsqueeze(-1) for x in _sums(one, two, -1)))
            merged = a.to(one.dtype) * one + b.to(one.dtype) * two
        out = merged if chunk.base is None else wide(chunk.base) + merged
        yield out.to(chunk.inputs[0].dtype)


def _pair(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = (wide(tensor) for tensor in chunk.inputs)
    return (one, two) if chunk.base is None else (one - wide(chunk.base), two - wide(chunk.base))


def _whole(stream: Stream, t: float) -> tuple[float, float]:
    dot = first = second = 0.0
    for chunk in stream.chunks():
        one, two = _pair(chunk)
        dot, first, second = dot + inner(one, two), first + inner(one, one), second + inner(two, two)
    return shares(t, dot, math.sqrt(first), math.sqrt(second), PARALLEL)


def _columns(stream: Stream, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    dot = first = second = torch.zeros(())  # takes the shape and the device of what is added
    for chunk in stream.chunks():
        more = _sums(*_pair(chunk), 0)
        dot, first, second = dot + more[0], first + more[1], second + more[2]
    return _many(t, dot, first, second)


def _sums(one: torch.Tensor, two: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dot product and squared lengths along ``dim``, float64."""
    dot, first, second = ((x * y).to(torch.float64).sum(dim) for x, y in ((one, two), (one, one), (two, two)))
    return dot, first, second


def _many(t: float, dot: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``spheres.shares`` of many vectors at once, from their dot products and squared lengths."""
    norms = [
        torch.where(square.sqrt() > SMALL_NORM, square.sqrt(), torch.ones_like(square)) for square in (first, second)
    ]
    cosine = (dot / norms[0] / norms[1]).clamp(-1, 1)
    straight = cosine.abs() > PARALLEL
    angle = torch.acos(torch.where(straight, torch.zeros_like(cosine), cosine))
    a, b = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    return torch.where(straight, 1 - t, a), torch.where(straight, t, b)


NUSLERP = Method(
    "nuslerp",
    nuslerp,
    (Parameter("weight", per_input=True), Parameter("nuslerp_flatten", True), Parameter("nuslerp_row_wise", False)),
    base="optional",
    fewest=2,
    most=2,
)
