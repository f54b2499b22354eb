# SPDX-License-Identifier: Apache-2.0
"""ram and ramplus_tl: elements that one model alone changed are kept whole, those that several changed are averaged.

With task vectors d_m = x_m - b, a model changed element i where |d_m,i| > epsilon, and c_i models did:
    ram:         out_i = b_i + (sum over them of d_m,i) / c_i
    ramplus_tl:  the same, but where c_i = 1 d_m,i times 1 + r min(alpha, shared_m / unique_m),
shared_m and unique_m being how many of the tensor's elements model m changed with others and alone.
Source: "Reinforced agent merging", arXiv 2601.13572.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.spheres import wide
from mindformers_ext.surgery.merge.stream import Stream, need_base
from mindformers_ext.surgery.merge.task_vectors import added, task_vectors

EPSILON = Parameter("epsilon", 1e-5, low=0.0)
TINY = 1e-30


def ram(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the mean of the changes, in the type of the inputs."""
    epsilon = settings.number("epsilon")
    for chunk in stream.chunks():
        deltas = task_vectors(chunk)
        changed, count = _changes(deltas, epsilon)
        yield need_base(chunk) + added(_shares(deltas, changed, count))


def ramplus_tl(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """The same with what one model alone changed made larger; sums in float32, rounded once."""
    epsilon, factors = settings.number("epsilon"), _factors(stream, settings)
    for chunk in stream.chunks():
        deltas = task_vectors(chunk)
        changed, count = _changes(deltas, epsilon)
        alone = count == 1
        terms = [
            torch.where(alone, wide(share) * factor, wide(share))
            for share, factor in zip(_shares(deltas, changed, count), factors, strict=True)
        ]
        yield (wide(need_base(chunk)) + added(terms)).to(chunk.inputs[0].dtype)


def _changes(deltas: Sequence[torch.Tensor], epsilon: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Where each model changed an element, and how many models did."""
    changed = [delta.abs() > epsilon for delta in deltas]
    count = sum((mask.to(torch.int32) for mask in changed[1:]), changed[0].to(torch.int32))
    return changed, count


def _shares(deltas: Sequence[torch.Tensor], changed: Sequence[torch.Tensor], count: torch.Tensor) -> list[torch.Tensor]:
    """Each model's part of the mean change, in the type of the task vectors."""
    divisor = count.clamp(min=1)
    return [delta * mask / divisor for delta, mask in zip(deltas, changed, strict=True)]


def _factors(stream: Stream, settings: Settings) -> list[float]:
    """1 + r min(alpha, shared / unique) of each model; nothing unique counts as ``epsilon`` elements."""
    epsilon = settings.number("epsilon")
    shared, unique = [0] * stream.inputs, [0] * stream.inputs
    for chunk in stream.chunks():
        changed, count = _changes(task_vectors(chunk), epsilon)
        for number, mask in enumerate(changed):
            alone = int((mask & (count == 1)).sum())
            unique[number] += alone
            shared[number] += int(mask.sum()) - alone
    r, alpha = settings.number("r"), settings.number("alpha")
    ratios = [some / max(few, epsilon, TINY) for some, few in zip(shared, unique, strict=True)]
    return [1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios]


RAM = Method("ram", ram, (EPSILON,))
RAMPLUS_TL = Method("ramplus_tl", ramplus_tl, (Parameter("r", 0.1), Parameter("alpha", 0.2, low=0.0), EPSILON))
