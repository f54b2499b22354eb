# SPDX-License-Identifier: Apache-2.0
"""The transpose of a matrix in memory, about as fast as numpy allows.

numpy moves one number at a time when strides differ, whatever its width. So the numbers of neighbouring rows are first
laid beside each other, which reads and writes along rows, and then moved together as one of 64 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.formats.tensors import Array

Numbers = npt.NDArray[np.unsignedinteger[Any]]

WIDE = np.dtype(np.uint64)
THREADS = min(4, len(os.sched_getaffinity(0)))  # that transpose bands; memory has no room for more
PAD = 8  # numbers behind a row: rows whose distance is a power of two push each other out of the cache


def transpose_into(matrix: Numbers, out: Numbers) -> None:
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


def transpose_bands(out: Array, rows: int, read: Callable[[int], Array]) -> None:
    """Fill ``out`` with the transpose of a matrix, in bands of ``rows``, several at once; ``read`` gives the band that
    begins at a row."""

    def fill(top: int) -> None:
        transpose_into(_numbers(read(top)), _numbers(out[:, top : top + rows]))

    tops = range(0, out.shape[1], rows)
    with ThreadPoolExecutor(min(THREADS, len(tops))) as pool:
        list(pool.map(fill, tops))


def shaped(scratch: list[Array], shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Memory of ``scratch`` as an array; fresh pages cost more than turning, so they are used again."""
    size = prod(shape) * kind.itemsize
    if not scratch or scratch[0].size < size:
        scratch[:] = [np.empty(size, np.uint8)]
    return scratch[0][:size].view(kind).reshape(shape)


def _numbers(array: Array) -> Numbers:
    """The same bits as plain numbers of the same width: numpy copies bfloat16 slowly."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))
