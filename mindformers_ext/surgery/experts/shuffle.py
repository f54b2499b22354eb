# SPDX-License-Identifier: Apache-2.0
"""Drop-Upcycling (Nakamura et al. 2025, arXiv:2502.19261): an expert's neurons in an order of its own, some drawn anew.

The order alone leaves a feed-forward part as it was: neuron i is row i of gate and up and column i of down. Redrawn
rows are normal, of the mean and deviation that exactly their entries had together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 512  # neurons of which sums are taken at once


def shuffled(
    dense: np.ndarray,
    axis: int,
    order: np.ndarray,
    redrawn: np.ndarray,
    part: slice,
    random: np.random.Generator,
) -> np.ndarray:
    """The neurons ``part`` of ``dense`` (neurons along ``axis`` of two) in the new ``order``, in its type.

    ``redrawn``: which places of the new order are drawn anew, in the whole of it: parts of one expert have one mean and
    deviation. What is drawn for a part follows from ``random`` alone.
    """
    result = np.take(dense, order[part], axis)
    here = redrawn[(redrawn >= part.start) & (redrawn < part.stop)] - part.start
    if not here.size:
        return result
    mean, deviation = moments(dense, axis, order[redrawn])
    rows = here.size if axis == 0 else dense.shape[0]
    fresh = random.standard_normal((rows, dense.shape[1] if axis == 0 else here.size), dtype=np.float32)
    fresh *= np.float32(deviation)
    fresh += np.float32(mean)
    result[here if axis == 0 else (slice(None), here)] = fresh.astype(dense.dtype)
    return result


def moments(dense: np.ndarray, axis: int, neurons: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (unbiased; 0 of a single entry) of the entries of all ``neurons``, in float64."""
    parts = [neurons[start : start + BLOCK] for start in range(0, len(neurons), BLOCK)]
    count = len(neurons) * dense.shape[1 - axis]

    def blocks() -> Iterator[np.ndarray]:
        return (np.take(dense, part, axis).astype(np.float64) for part in parts)

    mean = sum(float(block.sum()) for block in blocks()) / count
    squares = sum(float(np.square(block - mean).sum()) for block in blocks())
    return mean, float(np.sqrt(squares / max(count - 1, 1)))
