# SPDX-License-Identifier: Apache-2.0
"""sce: select, calculate, erase.

Select: of the variances over the models keep the positions of the top ``select_topk`` part. Calculate:
w_m = mean(d_m^2) / sum over models. Erase: S = sign of sum_m d_m (0 counts as +1), elements of another sign leave;
out = b + sum(w_m mask_m d_m) / max(sum(w_m mask_m), 1e-6). Source: Wan et al. 2024, "FuseChat", arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.bits import kept
from mindformers_ext.surgery.merge.select import FirstEqual, largest_of_each
from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.stream import Stream, need_base
from mindformers_ext.surgery.merge.task_vectors import task_vectors

LEAST = 1e-6


def sce(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the selected, weighted task vectors of the elected sign."""
    weights = _weights(stream, settings)
    for start_base, deltas in _selected(stream, settings):
        plus = torch.stack(deltas).sum(0) >= 0
        agree = [torch.where(plus, delta > 0, delta < 0) for delta in deltas]
        total = sum((mask * weight for mask, weight in zip(agree, weights, strict=True)), torch.zeros(()))
        terms = (delta * mask * weight for delta, mask, weight in zip(deltas, agree, weights, strict=True))
        summed = sum(terms, torch.zeros((), dtype=deltas[0].dtype, device=deltas[0].device))
        yield (start_base + summed / total.clamp_min(LEAST).to(summed.dtype)).to(start_base.dtype)


def _weights(stream: Stream, settings: Settings) -> list[float]:
    squares = [0.0] * stream.inputs
    for _, deltas in _selected(stream, settings):
        for number, delta in enumerate(deltas):
            squares[number] += float(delta.to(torch.float64).square().sum())
    total = sum(squares)
    return [square / total if total > 0 else 1.0 / len(squares) for square in squares]


def _selected(stream: Stream, settings: Settings) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """The base's chunks with the task vectors, zero outside the selection."""
    count = max(1, int(settings.number("select_topk") * stream.numel))
    picker = None
    if count < stream.numel:
        picker = FirstEqual(largest_of_each(lambda: ((v,) for v in _variances(stream)), (count,), torch.float32)[0])
    for chunk in stream.chunks():
        deltas = task_vectors(chunk)
        if picker:
            mask = picker.mask(_variance(deltas))
            deltas = [kept(delta, mask) for delta in deltas]
        yield need_base(chunk), deltas


def _variances(stream: Stream) -> Iterator[torch.Tensor]:
    for chunk in stream.chunks():
        yield _variance(task_vectors(chunk))


def _variance(deltas: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(deltas).to(torch.float32).var(dim=0, unbiased=False)


SCE = Method("sce", sce, (Parameter("select_topk", 1.0, low=0.0, high=1.0), Parameter("int8_mask", False)))
