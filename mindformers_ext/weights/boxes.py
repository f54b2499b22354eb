# SPDX-License-Identifier: Apache-2.0
"""Boxes of tensors: one slice for each axis. Reads them in bounded memory and cuts them into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from mindformers_ext.formats.strategy import Box
from mindformers_ext.formats.tensors import Array, Index, TensorReader

PIECE = 32 * 2**20
RUN = 2**12  # bytes; shorter runs are read with what lies between them


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is a whole tensor of ``shape``."""
    return tuple(slice(0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of what ``box`` selects."""
    return tuple(item.stop - item.start for item in box)


def overlap(left: Box, right: Box) -> Box | None:
    """What two boxes of one tensor share, or None."""
    pairs = zip(left, right, strict=True)
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
    return common if all(item.start < item.stop for item in common) else None


def full_box(index: Index, shape: tuple[int, ...]) -> tuple[Box, tuple[int, ...]]:
    """``index`` as one slice for each axis, and the axes that an int drops."""
    box, dropped = [], []
    for axis, size in enumerate(shape):
        item = index[axis] if axis < len(index) else slice(None)
        if isinstance(item, int):
            if not 0 <= item < size:
                raise IndexError(f"index {item} is outside an axis of {size}")
            dropped.append(axis)
            item = slice(item, item + 1)
        start, stop, step = item.indices(size)
        if step != 1:
            raise IndexError(f"slices of step {step} are not read")
        box.append(slice(start, max(start, stop)))
    return tuple(box), tuple(dropped)


def shift(box: Box, origin: Box) -> Box:
    """``box`` counted from the corner of ``origin``."""
    return tuple(slice(item.start - base.start, item.stop - base.start) for item, base in zip(box, origin, strict=True))


def read_box(reader: TensorReader, name: str, box: Box) -> Array:
    """The part ``box`` of a tensor. Where it lies in short runs of bytes, whole rows are read and cut in memory."""
    info = reader.infos[name]
    cut, run = len(box), info.dtype.itemsize  # axes from ``cut`` on are read whole
    for axis in reversed(range(len(box))):
        size = box[axis].stop - box[axis].start
        if size < info.shape[axis]:
            if run * size >= RUN:
                break
            cut = axis
        run *= info.shape[axis]
    if cut == len(box):
        return reader.read(name, box)
    waste = prod(info.shape[cut:]) // max(prod(sizes(box[cut:])), 1)
    out = np.empty(sizes(box), info.dtype)
    for piece in pieces(box, info.dtype.itemsize * max(waste, 1)):
        rows = reader.read(name, piece[:cut])
        out[shift(piece, box)] = rows[(slice(None),) * cut + piece[cut:]]
    return out


def pieces(box: Box, itemsize: int, limit: int | None = None) -> Iterator[Box]:
    """Cut ``box`` into consecutive boxes, in C order, of at most ``limit`` bytes (``PIECE``); one element at least."""
    limit = PIECE if limit is None else limit
    shape = sizes(box)
    if not box or prod(shape) * itemsize <= limit:
        yield box
        return
    row = prod(shape[1:]) * itemsize
    first, rest = box[0], box[1:]
    if row <= limit:
        step = max(limit // row, 1)
        for start in range(first.start, first.stop, step):
            yield (slice(start, min(start + step, first.stop)), *rest)
        return
    for start in range(first.start, first.stop):
        for inner in pieces(rest, itemsize, limit):
            yield (slice(start, start + 1), *inner)
