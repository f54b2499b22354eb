# SPDX-License-Identifier: Apache-2.0
"""ties: of each task vector keep the k = floor(density n) largest magnitudes (at least one), elect signs, average.

Of equal magnitudes at the threshold those with the lowest index stay. density 0 keeps nothing. The rest is
``task_vectors``. Source: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mindformers_ext.surgery.merge.bits import kept
from mindformers_ext.surgery.merge.select import FirstEqual, Threshold, largest_of_each
from mindformers_ext.surgery.merge.settings import Method, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import (
    DENSITY,
    Sparsify,
    merge_task_vectors,
    task_parameters,
    task_vectors,
)


def magnitude(stream: Stream, settings: Settings) -> Callable[[], Sparsify]:
    """Keeps the largest magnitudes of each whole task vector."""
    densities = settings.each("density")
    asked = [number for number, density in enumerate(densities) if 0 < density < 1]
    found = thresholds(stream, asked, [max(1, int(densities[number] * stream.numel)) for number in asked])

    def fresh() -> Sparsify:
        pickers = {number: FirstEqual(threshold) for number, threshold in found.items()}

        def sparsify(number: int, start: int, delta: torch.Tensor) -> torch.Tensor:
            if number in pickers:
                return kept(delta, pickers[number].mask(delta))
            return delta if densities[number] > 0 else torch.zeros_like(delta)

        return sparsify

    return fresh


def thresholds(stream: Stream, numbers: list[int], counts: list[int]) -> dict[int, Threshold]:
    """Where the ``counts`` largest magnitudes of the task vectors ``numbers`` end."""
    if not numbers:
        return {}
    dtype = next(iter(stream.chunks())).inputs[0].dtype

    def walk() -> Iterator[tuple[torch.Tensor, ...]]:
        for chunk in stream.chunks():
            deltas = task_vectors(chunk)
            yield tuple(deltas[number] for number in numbers)

    return dict(zip(numbers, largest_of_each(walk, tuple(counts), dtype), strict=True))


def ties(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the mean of the trimmed task vectors that agree with the elected sign."""
    return merge_task_vectors(stream, settings, magnitude, elect=True)


TIES = Method("ties", ties, task_parameters(True, False, DENSITY))
