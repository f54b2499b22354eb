# SPDX-License-Identifier: Apache-2.0
"""slerp: spherical interpolation between two models, tensor by tensor.

The whole tensor is one vector: v0 of the base, v1 of the other model; with the angle a between them
    out = (sin((1-t) a) v0 + sin(t a) v1) / sin(a),
and the straight line (1-t) v0 + t v1 where |cos a| > 0.9995. t = 0 is the base. Source: Shoemake 1985.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import inner, mixed, shares, wide
from mindformers_ext.surgery.merge.stream import Stream, need_base


def slerp(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks at ``t`` of the way from the base to the one input, in their type."""
    t = settings.number("t")
    weights = (1.0 - t, t) if t in (0.0, 1.0) else _weights(stream, t)
    for chunk in stream.chunks():
        base, other = need_base(chunk), chunk.inputs[0]
        yield mixed(wide(base), wide(other), weights).to(base.dtype)


def _weights(stream: Stream, t: float) -> tuple[float, float]:
    dot = first = second = 0.0
    for chunk in stream.chunks():
        base, other = wide(need_base(chunk)), wide(chunk.inputs[0])
        dot, first, second = dot + inner(base, other), first + inner(base, base), second + inner(other, other)
    return shares(t, dot, math.sqrt(first), math.sqrt(second))


SLERP = Method("slerp", slerp, (Parameter("t"),), fewest=1, most=1, lone="copy")
