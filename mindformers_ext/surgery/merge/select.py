# SPDX-License-Identifier: Apache-2.0
"""The k-th largest magnitude of a tensor that comes in chunks, exactly, without sorting it.

The bits of a non-negative float order as the float does, so a histogram over the upper 16 bits finds the bucket that
holds the k-th value; for wider types the next 16 bits are counted within that bucket, and so on (radix selection).
16-bit floats need one walk, float32 two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mindformers_ext.surgery.merge.bits import INTEGERS, above, different, magnitude_bits

# bits counted in one walk, (top, bottom), by the bits of a magnitude; the sign is not among them
_LEVELS = {15: ((15, 0),), 31: ((31, 15), (15, 0)), 63: ((63, 47), (47, 31), (31, 15), (15, 0))}


@dataclass(frozen=True)
class Threshold:
    """Where the k largest end: everything above ``bits`` is in, and of those equal to it the first ``equal``."""

    bits: int
    equal: int


def largest_of_each(
    walk: Callable[[], Iterable[tuple[torch.Tensor, ...]]], counts: tuple[int, ...], dtype: torch.dtype
) -> list[Threshold]:
    """Thresholds of the ``counts`` largest magnitudes of tensors that ``walk`` gives together, in chunks, each time.

    Every count lies between 1 and the number of elements; ``dtype`` is that of the chunks.
    """
    width = INTEGERS[dtype][1]
    prefix, left = [0] * len(counts), list(counts)
    for top, bottom in _LEVELS[width]:
        histograms = [np.zeros(1 << (top - bottom), np.int64) for _ in counts]
        for parts in walk():
            for number, part in enumerate(parts):
                bits = magnitude_bits(part).reshape(-1)
                if top < width:
                    bits = bits[(bits >> top) == prefix[number]]
                digits = (bits >> bottom) & ((1 << (top - bottom)) - 1) if width != top - bottom else bits
                histograms[number] += torch.bincount(digits, minlength=1 << (top - bottom)).cpu().numpy()
        for number, histogram in enumerate(histograms):
            bucket, left[number] = _bucket(histogram, left[number])
            prefix[number] = (prefix[number] << (top - bottom)) | bucket
    return [Threshold(bits, equal) for bits, equal in zip(prefix, left, strict=True)]


def _bucket(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest value, and its rank from above within the bucket."""
    above = histogram[::-1].cumsum()  # how many lie in this bucket or in a larger one, from the largest on
    place = int(np.searchsorted(above, k))
    bucket = len(histogram) - 1 - place
    return bucket, k - (int(above[place]) - int(histogram[bucket]))


class FirstEqual:
    """Picks the values beyond a threshold, chunk by chunk in order; of equal ones those that come first."""

    def __init__(self, threshold: Threshold) -> None:
        """Begin before the first chunk."""
        self._bits, self._left = threshold.bits, threshold.equal

    def mask(self, chunk: torch.Tensor) -> torch.Tensor:
        """All ones where a value of the next ``chunk`` belongs to the largest (a mask of ``bits``)."""
        bits = magnitude_bits(chunk)
        larger = above(bits, self._bits)
        if self._left <= 0:
            return larger
        equal = different(bits, self._bits).bitwise_not_()
        count = -int(equal.sum())
        if count > self._left:
            order = equal.reshape(-1).cumsum(0, dtype=torch.int64).reshape(equal.shape)
            equal &= (order >= -self._left).to(equal.dtype).neg_()
        self._left -= min(count, self._left)
        return larger | equal
