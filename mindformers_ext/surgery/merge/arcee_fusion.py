# SPDX-License-Identifier: Apache-2.0
"""arcee_fusion: of the other model only the elements that matter most, the rest of the base.

The importance of an element is |d| times the divergence of its row, KL(softmax(x) + 1e-8 || softmax(b) + 1e-8), with
d = x - b. Elements of at least median + 1.5 (third - first quartile) of the tensor's importances are those of x.
Quartiles are the elements of rank floor(q (n - 1)) of all (mergekit samples a million). Source: mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.bits import INTEGERS
from mindformers_ext.surgery.merge.select import Threshold, largest_of_each
from mindformers_ext.surgery.merge.settings import Method, Settings
from mindformers_ext.surgery.merge.spheres import wide
from mindformers_ext.surgery.merge.stream import Chunk, Stream, need_base

LEAST = 1e-8  # added to every probability
QUARTILES = (0.25, 0.5, 0.75)
SPREAD = 1.5


def arcee_fusion(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base with the elements of the one input that matter, in their type."""
    low = _threshold(stream) if stream.numel else 0.0
    for chunk in stream.chunks():
        base = need_base(chunk)
        mask = (_importance(chunk) >= low).to(base.dtype)
        yield base + (chunk.inputs[0] - base) * mask


def _importance(chunk: Chunk) -> torch.Tensor:
    """At least float32: in 16 bits most divergences of a row round to zero. Never negative, as a divergence is."""
    base, other = wide(need_base(chunk)), wide(chunk.inputs[0])
    p, q = (torch.softmax(rows, dim=-1) + LEAST for rows in (other, base))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True).clamp_(min=0)
    return (other - base).abs_() * divergence


def _threshold(stream: Stream) -> float:
    ranks = [int(quartile * (stream.numel - 1)) for quartile in QUARTILES]
    dtype = _importance(next(iter(stream.chunks()))).dtype

    def walk() -> Iterator[tuple[torch.Tensor, ...]]:
        for chunk in stream.chunks():
            yield (_importance(chunk),) * len(ranks)

    counts = tuple(stream.numel - rank for rank in ranks)
    first, median, third = (_value(found, dtype) for found in largest_of_each(walk, counts, dtype))
    return median + SPREAD * (third - first)


def _value(threshold: Threshold, dtype: torch.dtype) -> float:
    """The number behind a threshold's bits."""
    return float(torch.tensor([threshold.bits], dtype=INTEGERS[dtype][0]).view(dtype))


ARCEE_FUSION = Method("arcee_fusion", arcee_fusion, (), fewest=1, most=1, lone="copy")
