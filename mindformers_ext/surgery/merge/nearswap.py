# SPDX-License-Identifier: Apache-2.0
"""nearswap: towards the other model where the two are near each other.

w = min(1, t / max(|a - b|, 1e-6)), out = w b + (1 - w) a, with a of the base: elements nearer than ``t`` are those of
the other model, further ones move by ``t`` towards it. Source: the model card of QuartetAnemoi-70B (alchemonaut 2024).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.stream import Stream, need_base

NEAREST = 1e-6  # distances are not divided by less


def nearswap(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks between the base and the one input, in their type."""
    t = settings.number("t")
    for chunk in stream.chunks():
        base, other = need_base(chunk), chunk.inputs[0]
        share = (t / (base - other).abs_().clamp_(min=NEAREST)).clamp_(0, 1)
        yield share * other + (1 - share) * base


NEARSWAP = Method("nearswap", nearswap, (Parameter("t"),), fewest=1, most=1)
