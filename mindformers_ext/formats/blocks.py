# SPDX-License-Identifier: Apache-2.0
"""Reads parts of a tensor whose bytes lie in one or more blocks of an open file. Only what is asked for is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.plain_file import open_plain
from mindformers_ext.formats.tensors import Array, Index, TensorInfo

HEAP = 8 * 2**20  # above what is made again and again; twice as much stays at a heap's end (mallopt(3))
Range = tuple[int, int]
_Writer = TypeVar("_Writer", bound="NewFile")


@dataclass(frozen=True)
class Block:
    """``length`` bytes at ``offset`` of the file."""

    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are, in order."""

    info: TensorInfo
    blocks: tuple[Block, ...]


class OpenFile:
    """A file open for reading at any place, by several readers at once (no shared position)."""

    def __init__(self, path: Path) -> None:
        """Open ``path``; a file that is not there is a ``UserError``."""
        self.path = path
        if not path.is_file():
            raise UserError(f"'{path}' is not a file: check the path")
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer at the end of the file."""
        return os.pread(self._fd, length, offset)

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise UserError(
                    f"'{self.path}' ended at byte {offset + done}: it was cut while being read; copy it again"
                )
            done += count


def open_new(path: Path) -> BinaryIO:
    """An empty file to write, never through a link. An empty one is not truncated: ext4 would flush it when closed."""
    descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT)
    if os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "wb")


class NewFile:
    """What writers of one file share: the file, open and empty, closed when the ``with`` block ends."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` to write."""
        self._file = open_new(path)

    def __enter__(self: _Writer) -> _Writer:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def checked_bytes(info: TensorInfo, parts: Iterable[Array]) -> Iterator[tuple[int, memoryview]]:
    """The bytes of consecutive ``parts`` (C order) of one tensor, each with its place among the tensor's bytes.

    A caller that drops what it got before it asks for more keeps one part alive at a time.

    Raises:
        ValueError: the parts are not of the type or not the ``nbytes`` that ``info`` announces.
    """
    done = 0
    for part in parts:
        data = byte_view(np.ascontiguousarray(part)).data
        if part.dtype != info.dtype or done + len(data) > info.nbytes:
            raise ValueError(f"'{info.name}': a part of {part.dtype}{part.shape} does not fit {info}")
        yield done, data
        done += len(data)
        del part, data  # or it lives on while the next one is made
    if done != info.nbytes:
        raise ValueError(f"'{info.name}': {done} bytes came, {info.nbytes} were announced")


def read_stored(file: OpenFile, tensor: StoredTensor, index: Index = ()) -> Array:
    """A new array with the tensor, or the part that ``index`` (ints and slices of step 1, leading axes) selects."""
    info = tensor.info
    ranges = [_range(item, size) for item, size in zip(index, info.shape, strict=False)]
    out = np.empty([stop - start for start, stop in ranges] + list(info.shape[len(ranges) :]), info.dtype)
    _fill(file, tensor, out, ranges, start=0, shape=info.shape)
    dropped = tuple(axis for axis, item in enumerate(index) if isinstance(item, int))
    return np.squeeze(out, axis=dropped) if dropped else out


def _range(item: int | slice, size: int) -> Range:
    if isinstance(item, int):
        if not 0 <= item < size:
            raise IndexError(f"index {item} is outside an axis of {size}")
        return item, item + 1
    start, stop, step = item.indices(size)
    if step != 1:
        raise IndexError(f"slices of step {step} are not read")
    return start, max(start, stop)


def _fill(
    file: OpenFile, tensor: StoredTensor, out: Array, ranges: Sequence[Range], start: int, shape: Sequence[int]
) -> None:
    """Fill ``out`` from the sub-tensor of ``shape`` whose first element is element ``start`` of the tensor."""
    row = prod(shape[1:])
    whole_rows = all(part == (0, size) for part, size in zip(ranges[1:], shape[1:], strict=False))
    if not ranges or whole_rows:
        first = ranges[0][0] * row if ranges else 0
        _copy(file, tensor, out, (start + first) * tensor.info.dtype.itemsize)
        return
    for place, number in enumerate(range(*ranges[0])):
        _fill(file, tensor, out[place], ranges[1:], start + number * row, shape[1:])


def _copy(file: OpenFile, tensor: StoredTensor, out: Array, offset: int) -> None:
    """Fill ``out`` with the tensor's bytes from its byte ``offset`` on, crossing blocks where needed."""
    target = byte_view(out).data
    done, position = 0, 0
    for block in tensor.blocks:
        skip = max(offset - position, 0)
        count = min(block.length - skip, len(target) - done)
        if count > 0:
            file.fill(target[done : done + count], block.offset + skip)
            done += count
        position += block.length


def keep_pages() -> None:
    """From now on malloc keeps the memory of freed arrays of up to some MB: fresh pages cost more than a copy."""
    np.empty(HEAP, np.uint8)


def byte_view(array: Array) -> npt.NDArray[Any]:
    """The bytes of a contiguous array, not copied (for bfloat16 and 0-d arrays too, where memoryview fails)."""
    return array.reshape(-1).view(np.uint8)
