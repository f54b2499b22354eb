# SPDX-License-Identifier: Apache-2.0
"""The order in which MindSpore's MindDataset hands out shuffled rows, without MindSpore.

MindRecord's shuffle is C++'s ``std::shuffle`` (as libstdc++ computes it, two draws from one number while they fit) with
``std::minstd_rand0``, in epoch e (from 0) of MindFormers' training seeded ``seed + 1 + e``. Found by comparing runs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MODULUS, _FACTOR = 2147483647, 16807  # Lewis, Goodman and Miller 1969
_RANGE = _MODULUS - 2  # largest number minus smallest


class _Draws:
    """Whole numbers from 0 to a limit, as ``std::uniform_int_distribution`` makes them."""

    def __init__(self, seed: int) -> None:
        self.state = seed % _MODULUS or 1

    def up_to(self, limit: int) -> int:
        scaling = _RANGE // (limit + 1)
        past = (limit + 1) * scaling
        while True:
            self.state = self.state * _FACTOR % _MODULUS
            if self.state - 1 < past:
                return (self.state - 1) // scaling


def _shuffle(rows: list[int], seed: int) -> None:
    draws, count = _Draws(seed), len(rows)
    if count == 0:
        return
    if _RANGE // count < count:  # too many rows for two places in one number
        for place in range(1, count):
            other = draws.up_to(place)
            rows[place], rows[other] = rows[other], rows[place]
        return
    place = 1
    if count % 2 == 0:
        other = draws.up_to(1)
        rows[place], rows[other] = rows[other], rows[place]
        place = 2
    while place < count:
        pair = draws.up_to((place + 1) * (place + 2) - 1)
        for other in divmod(pair, place + 2):
            rows[place], rows[other] = rows[other], rows[place]
            place += 1


class RowOrder:
    """Rows by epoch, from 0. ``seed``: MindFormers' data sets take that of the run."""

    def __init__(self, rows: int, shuffle: bool, seed: int = 0) -> None:
        self.rows, self.shuffles, self.seed = rows, shuffle, seed
        self._kept: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """All rows in the order of epoch ``number``; the last one asked for is kept."""
        if self._kept is None or self._kept[0] != number:
            rows = list(range(self.rows))
            if self.shuffles:
                _shuffle(rows, self.seed + 1 + number)
            self._kept = number, np.array(rows, np.int64)
        return self._kept[1]
