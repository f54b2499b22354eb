# SPDX-License-Identifier: Apache-2.0
"""The transpose of a matrix in memory, about as fast as numpy allows.

numpy moves one number at a time when strides differ, whatever its width. So the numbers of neighbouring rows are first
laid beside each other, which reads and writes along rows, and then moved together as one of 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.unsignedinteger[Any]]

WIDE = np.dtype(np.uint64)
PAD = 8  # numbers behind a row: rows whose distance is a power of two push each other out of the cache


def turn(matrix: Numbers, out: Numbers) -> None:
    """Fill ``out`` (columns, rows) with the transpose of ``matrix`` (rows, columns); the rows of both are contiguous.

    A matrix that fits the processor's cache twice is turned fastest.
    """
    rows, columns = matrix.shape
    together = WIDE.itemsize // matrix.itemsize
    joined = rows - rows % together if together > 1 else 0
    if joined:
        beside = np.empty((joined // together, columns + PAD, together), matrix.dtype)[:, :columns]
        for place in range(together):
            beside[:, :, place] = matrix[place:joined:together]
        out[:, :joined].view(WIDE)[...] = beside.view(WIDE)[..., 0].T
    out[:, joined:] = matrix[joined:].T
