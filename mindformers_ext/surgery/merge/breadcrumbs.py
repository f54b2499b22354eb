# SPDX-License-Identifier: Apache-2.0
"""breadcrumbs: of each task vector drop the floor(gamma n) largest magnitudes and keep the next floor(density n).

breadcrumbs_ties elects signs after that. Source: Davari and Belilovsky 2023, "Model breadcrumbs", arXiv 2312.06795.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mindformers_ext.surgery.merge.bits import kept
from mindformers_ext.surgery.merge.select import FirstEqual
from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import DENSITY, Sparsify, merge_task_vectors, task_parameters
from mindformers_ext.surgery.merge.ties import thresholds

GAMMA = Parameter("gamma", 0.01, per_input=True, low=0.0, high=1.0)


def outliers(stream: Stream, settings: Settings) -> Callable[[], Sparsify]:
    """Keeps a band of magnitudes: below the largest, above the smallest."""
    n = stream.numel
    bands = [
        _band(n, density, gamma)
        for density, gamma in zip(settings.each("density"), settings.each("gamma"), strict=True)
    ]
    tops = _found(stream, [top for top, _ in bands])
    bottoms = _found(stream, [bottom for _, bottom in bands])

    def fresh() -> Sparsify:
        high = {number: FirstEqual(threshold) for number, threshold in tops.items()}
        low = {number: FirstEqual(threshold) for number, threshold in bottoms.items()}

        def sparsify(number: int, start: int, delta: torch.Tensor) -> torch.Tensor:
            if bands[number][1] == 0:
                return torch.zeros_like(delta)
            band = kept(delta, low[number].mask(delta)) if number in low else delta
            return kept(band, high[number].mask(delta).bitwise_not_()) if number in high else band

        return sparsify

    return fresh


def _band(n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest are dropped, and how many of the largest are looked at in all."""
    keep, top = int(density * n), int(gamma * n)
    return min(top, n - keep), min(n, top + keep)


def _found(stream: Stream, counts: list[int]) -> dict:
    asked = [number for number, count in enumerate(counts) if 0 < count < stream.numel]
    return thresholds(stream, asked, [counts[number] for number in asked])


def breadcrumbs(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the weighted sum of the trimmed task vectors."""
    return merge_task_vectors(stream, settings, outliers)


def breadcrumbs_ties(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the sum of the trimmed task vectors that agree with the elected sign."""
    return merge_task_vectors(stream, settings, outliers, elect=True)


BREADCRUMBS = Method("breadcrumbs", breadcrumbs, task_parameters(False, False, DENSITY, GAMMA))
BREADCRUMBS_TIES = Method("breadcrumbs_ties", breadcrumbs_ties, task_parameters(False, False, DENSITY, GAMMA))
