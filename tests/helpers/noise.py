# SPDX-License-Identifier: Apache-2.0
"""The noise of gates that add it, as both engines have to draw it; in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.philox import noise_blocks, normal


def mixture_noise(keys: npt.NDArray[np.int32], place: int, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Standard normal noise (rows, tokens, experts) of mixture number ``place`` of a step.

    Args:
        keys: ``noise_keys``.
        place: of the mixture among all, from 0.
        shape: mixtures, tokens, experts.
    """
    mixtures, tokens, experts = shape
    blocks, found = noise_blocks(tokens, experts), []
    for low, step, row in keys.astype(np.int64) & 0xFFFFFFFF:
        first = (int(row) * mixtures + place) * blocks
        found.append(normal(int(step) << 32 | int(low), 4 * blocks, 1.0, first)[: tokens * experts])
    noise: npt.NDArray[np.float32] = np.stack(found).reshape(len(keys), tokens, experts)
    return noise
