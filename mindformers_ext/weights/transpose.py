# SPDX-License-Identifier: Apache-2.0
"""The transpose of a matrix of 16- or 32-bit numbers in memory, about as fast as numpy allows.

numpy moves one number at a time when strides differ, and the width of a number costs nothing: neighbours are moved
together as one 64-bit number and taken apart by shifts, which numpy does many at a time. Tiles keep both sides in
the processor's cache.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.unsignedinteger[Any]]

TILE = 256  # rows and columns of a tile: 128 KiB of 16-bit numbers, and as much for the 64-bit ones
WIDE = np.dtype(np.uint64)


def turned(matrix: Numbers) -> Numbers:
    """The transpose (columns, rows), contiguous, of ``matrix`` (rows, columns), whose rows are contiguous each."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    together = WIDE.itemsize // matrix.itemsize
    packed = columns - columns % together if sys.byteorder == "little" and together > 1 else 0
    wide = matrix[:, :packed].view(WIDE)
    for left in range(0, packed, TILE):
        right = min(left + TILE, packed)
        for top in range(0, rows, TILE):
            bottom = min(top + TILE, rows)
            tile = wide[top:bottom, left // together : right // together].T.copy()
            for place in range(together):
                np.copyto(out[left + place : right : together, top:bottom], tile, casting="unsafe")  # the low bits
                tile >>= np.uint64(8 * matrix.itemsize)
    for top in range(0, rows, TILE):
        out[packed:, top : top + TILE] = matrix[top : top + TILE, packed:].T
    return out
