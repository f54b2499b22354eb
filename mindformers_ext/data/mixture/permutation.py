# SPDX-License-Identifier: Apache-2.0
"""Orders of any number of rows that are computed where they are asked for: nothing of the corpus' size is held.

A generalised Feistel network (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5) permutes the
numbers below a b, the smallest such product of nearly equal sides that holds all rows; what falls outside the rows is
permuted again until it does not. Its rounds mix with the finaliser of SplitMix64 (Steele et al. 2014) and keys of
Philox.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

ROUNDS = 8  # even, so that the sides are back in their places
MOST = 1 << 62  # rows: sides stay below 2^32
_SHIFT = np.uint64(32)
_MIX = tuple(
    (np.uint64(shift), np.uint64(factor)) for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
_LAST = np.uint64(31)
Numbers = npt.NDArray[np.uint64]


class Permutation:
    """The rows of one domain in one pass. ``key``: two 64-bit words, the seed and the rest."""

    def __init__(self, rows: int, key: tuple[int, int]) -> None:
        if not 0 < rows <= MOST:
            raise ValueError(f"{rows} rows cannot be permuted")
        self.rows = rows
        wide = max(isqrt(rows - 1) + 1, 1)  # the smallest with wide^2 >= rows
        self.sides = np.uint64(wide), np.uint64(-(-rows // wide))
        self._keys = np.random.Philox(key=np.array(key, np.uint64)).random_raw(ROUNDS)

    def at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows at these places (from 0) of the order; different places have different rows."""
        found = self._once(places.astype(np.uint64))
        rows = np.uint64(self.rows)
        outside = np.flatnonzero(found >= rows)
        while outside.size:
            found[outside] = self._once(found[outside])
            outside = outside[found[outside] >= rows]
        return found.astype(np.int64)

    def _once(self, numbers: Numbers) -> Numbers:
        wide, high = self.sides
        left, right = numbers % wide, numbers // wide
        sides = wide, high
        for key in self._keys:  # left + f(right), each below its own side, and they change places
            side = sides[0]
            left, right = right, _below(left + (_mixed(right ^ key) >> _SHIFT) * side // _RANGE, side)
            sides = sides[1], side
        return right * wide + left


_RANGE = np.uint64(1 << 32)


def _mixed(words: Numbers) -> Numbers:
    for shift, factor in _MIX:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> _LAST)


def _below(numbers: Numbers, side: np.uint64) -> Numbers:
    """``numbers`` below twice the ``side``, modulo it."""
    return np.where(numbers >= side, numbers - side, numbers)
