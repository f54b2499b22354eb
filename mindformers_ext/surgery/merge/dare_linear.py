# SPDX-License-Identifier: Apache-2.0
"""dare_linear: of each task vector every element stays with probability ``density``; then the weighted sum.

With ``rescale`` what stays is multiplied so that its sum of magnitudes is that of the whole task vector again
(``rescale_mode`` "density": by 1 / density, as in the paper; equal in expectation). The masks come from the seed, the
tensor's name and the model's number alone. Source: Yu et al. 2023, "Language models are Super Mario", arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np
import torch

from mindformers_ext.surgery.merge.bits import kept
from mindformers_ext.surgery.merge.random_masks import bit_mask, keep_mask
from mindformers_ext.surgery.merge.settings import Method, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import DENSITY, Sparsify, merge_task_vectors, task_parameters

REMEMBERED = 2**27  # elements of all models of a tensor up to which masks are kept from one walk to the next


def bernoulli(stream: Stream, settings: Settings) -> Callable[[], Sparsify]:
    """Keeps each element with probability density. Drawn masks are remembered, a bit per element, for a second walk."""
    densities = settings.each("density")
    drawn: dict[tuple[int, int], np.ndarray] | None = {} if stream.numel * len(densities) <= REMEMBERED else None

    def mask_of(number: int, start: int, shape: tuple[int, ...]) -> np.ndarray:
        if drawn is None:
            return keep_mask(settings.seed, stream.name, number, start, shape, densities[number])
        found = drawn.get((number, start))
        if found is not None:
            return np.unpackbits(found, count=prod(shape)).view(np.bool_).reshape(shape)
        mask = keep_mask(settings.seed, stream.name, number, start, shape, densities[number])
        drawn[number, start] = np.packbits(mask.reshape(-1))
        return mask

    def sparsify(number: int, start: int, delta: torch.Tensor) -> torch.Tensor:
        if densities[number] >= 1:
            return delta
        return kept(delta, bit_mask(mask_of(number, start, tuple(delta.shape))).to(delta.device))

    return lambda: sparsify


def dare_linear(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the weighted sum of the thinned task vectors."""
    return merge_task_vectors(stream, settings, bernoulli)


DARE_LINEAR = Method("dare_linear", dare_linear, task_parameters(False, True, DENSITY), random=True)
