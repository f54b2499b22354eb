# SPDX-License-Identifier: Apache-2.0
"""della: the larger a magnitude within its row, the likelier it stays.

Rank r = 1 ... m of |d| within a row (1 the smallest): kept with probability density - eps + 2 eps (r-1)/(m-1).
della elects signs after that, della_linear does not. Source: Deep et al. 2024, "DELLA-Merging", arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mindformers_ext.surgery.merge.bits import kept
from mindformers_ext.surgery.merge.random_masks import uniform
from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import DENSITY, Sparsify, merge_task_vectors, task_parameters

EPSILON = Parameter("epsilon", 0.15, per_input=True, low=0.0, high=1.0)


def ranked(stream: Stream, settings: Settings) -> Callable[[], Sparsify]:
    """Keeps elements with a probability that rises with their rank in the row."""
    both = list(zip(settings.each("density"), settings.each("epsilon"), strict=True))

    def sparsify(number: int, start: int, delta: torch.Tensor) -> torch.Tensor:
        density, epsilon = both[number]
        if density >= 1:
            return delta
        if density <= 0:
            return torch.zeros_like(delta)
        width = delta.shape[-1]
        ranks = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        chance = density - epsilon + 2 * epsilon * ranks.to(torch.float32) / max(width - 1, 1)
        drawn = uniform(settings.seed, stream.name, number, start, tuple(delta.shape)).to(delta.device)
        return kept(delta, (drawn < chance).to(torch.int16).neg_())

    return lambda: sparsify


def della(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the mean of the thinned task vectors that agree with the elected sign."""
    return merge_task_vectors(stream, settings, ranked, elect=True)


def della_linear(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the weighted sum of the thinned task vectors."""
    return merge_task_vectors(stream, settings, ranked)


DELLA = Method("della", della, task_parameters(True, True, DENSITY, EPSILON), random=True)
DELLA_LINEAR = Method("della_linear", della_linear, task_parameters(False, True, DENSITY, EPSILON), random=True)
