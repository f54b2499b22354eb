# SPDX-License-Identifier: Apache-2.0
"""MindSpore's ``.ckpt``, read and written without MindSpore and without holding the file in memory.

The file is a run of protobuf messages: Checkpoint { repeated Value value = 1 }, Value { string tag = 1; TensorProto
tensor = 2; MapTensorProto maptensor = 3 }, TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes
tensor_content = 3 }. A large tensor is several consecutive Values of one tag, each with the whole dims and a slice
of the bytes. Optional end: b"crc_num" and the CRC-32 of all before, 10 bytes big-endian.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.blocks import Block, NewFile, OpenFile, StoredTensor, checked_bytes, read_stored
from mindformers_ext.formats.dtypes import BY_MINDSPORE, BY_NUMPY
from mindformers_ext.formats.tensors import MOST_TENSORS, Array, Index, TensorInfo
from mindformers_ext.formats.wire import BYTES, VARINT, Cursor, bytes_field, varint, varint_field

SLICE_BYTES = 512 * 2**20  # where MindSpore itself cuts
CRC_MARK, CRC_LENGTH = b"crc_num", 17
MAX_NAME = 4096
MAX_DIMS = 32
Part = tuple[str, tuple[int, ...], str, Block]
"""Tag, dims, tensor_type and where the bytes are, of one Value."""


class CkptFile:
    """A ``TensorReader`` of one ``.ckpt``. Opening walks over the messages and skips the data."""

    def __init__(self, path: Path) -> None:
        """Open and check; a damaged, cut or encrypted file is a ``UserError`` that names the byte."""
        self._file = OpenFile(path)
        self._crc: int | None = None
        try:
            self._tensors = {tensor.info.name: tensor for tensor in self._walk()}
        except UserError:
            self._file.close()
            raise
        self.infos: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        return read_stored(self._file, self._tensors[name], index)

    def check_crc(self, chunk: int = 2**24) -> bool:
        """Compare the CRC in the file with its bytes: False when it has none, ``UserError`` when they differ."""
        if self._crc is None:
            return False
        crc, end = 0, self._file.size - CRC_LENGTH
        for offset in range(0, end, chunk):
            crc = zlib.crc32(self._file.bytes_at(offset, min(chunk, end - offset)), crc)
        if crc != self._crc:
            raise UserError(
                f"'{self._file.path}' is damaged: its CRC is {self._crc}, its bytes give {crc}; copy it again"
            )
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _walk(self) -> Iterator[StoredTensor]:
        """Every tensor, slices joined."""
        seen: set[str] = set()
        slices: list[Part] = []
        for part in self._parts():
            if slices and part[0] != slices[0][0]:
                yield _join(self._file.path, slices)
                slices = []
            if not slices:
                if part[0] in seen:
                    raise UserError(
                        f"'{self._file.path}' holds '{part[0]}' twice: it is damaged or was put together wrongly"
                    )
                seen.add(part[0])
                if len(seen) > MOST_TENSORS:
                    raise UserError(f"'{self._file.path}' holds more than {MOST_TENSORS} tensors: it is no checkpoint")
            slices.append(part)
        if not slices:
            raise UserError(f"'{self._file.path}' holds no parameters: it is empty")
        yield _join(self._file.path, slices)

    def _parts(self) -> Iterator[Part]:
        cursor = Cursor(self._file, 0, self._file.size, "checkpoint")
        while cursor.position < cursor.end:
            if cursor.end - cursor.position == CRC_LENGTH:
                tail = self._file.bytes_at(cursor.position, CRC_LENGTH)
                if tail.startswith(CRC_MARK):
                    self._crc = int.from_bytes(tail[len(CRC_MARK) :], "big")
                    return
            yield _value(cursor.message({1: BYTES}, "parameter")[1])


def _value(cursor: Cursor) -> Part:
    """One Value: its tag and its tensor, data skipped."""
    tag: str | None = None
    tensor: tuple[tuple[int, ...], str, Block] | None = None
    while cursor.position < cursor.end:
        number, field = cursor.message({1: BYTES, 2: BYTES, 3: BYTES}, tag or "parameter")
        if number == 1 and tag is None:
            tag = field.text(MAX_NAME)
        elif number == 2 and tensor is None:
            field.what = tag or field.what
            tensor = _tensor(field)
        elif number == 3:
            raise cursor.fault("is a hash-table parameter (MapParameter), which no model of ours has")
        else:
            raise cursor.fault("repeats a field")
    if tag is None or tensor is None:
        raise cursor.fault("has no name or no tensor")
    return (tag, *tensor)


def _tensor(cursor: Cursor) -> tuple[tuple[int, ...], str, Block]:
    dims: list[int] = []
    kind: str | None = None
    content: Block | None = None
    while cursor.position < cursor.end:
        number, wire = cursor.key()
        if (number, wire) == (1, VARINT):
            dims.append(cursor.varint())
        elif (number, wire) == (1, BYTES):  # packed, as protobuf's readers allow
            packed = cursor.inside()
            while packed.position < packed.end:
                dims.append(packed.varint())
        elif (number, wire) == (2, BYTES) and kind is None:
            kind = cursor.inside().text(64)
        elif (number, wire) == (3, BYTES) and content is None:
            inner = cursor.inside()
            content = Block(inner.position, inner.end - inner.position)
        else:
            raise cursor.fault(f"has an unknown or repeated field {number}")
        if len(dims) > MAX_DIMS:
            raise cursor.fault(f"has more than {MAX_DIMS} dimensions")
    if kind is None or content is None:
        raise cursor.fault("has no type or no data")
    return tuple(dims), kind, content


def _join(path: Path, slices: list[Part]) -> StoredTensor:
    """One tensor of consecutive slices; sizes are checked here, before anything is allocated."""
    tag, dims, kind, _ = slices[0]
    if any(part[1] != dims or part[2] != kind for part in slices):
        raise UserError(f"'{path}': the slices of '{tag}' have different shapes or types: the file is damaged")
    blocks = tuple(part[3] for part in slices)
    length = sum(block.length for block in blocks)
    if kind == "str":  # an entry of append_dict; numpy's UTF-32
        dtype: np.dtype[Any] = np.dtype(f"<U{length // 4}")
    elif kind in BY_MINDSPORE:
        dtype = BY_MINDSPORE[kind]
    else:
        raise UserError(f"'{path}': '{tag}' has type {kind}; known are {', '.join(BY_MINDSPORE)}")
    shape = () if dims == (0,) and length else dims  # MindSpore's readers take [0] for a scalar
    if prod(shape) * dtype.itemsize != length:
        raise UserError(
            f"'{path}': '{tag}' {shape} of {kind} needs {prod(shape) * dtype.itemsize} bytes, found {length}: "
            "the file is cut or damaged; copy it again"
        )
    return StoredTensor(TensorInfo(tag, shape, dtype), blocks)


class CkptWriter(NewFile):
    """Appends tensors to a new ``.ckpt``, one at a time; nothing of a tensor is kept or copied."""

    def __init__(self, path: Path, slice_bytes: int = SLICE_BYTES) -> None:
        """Tensors above ``slice_bytes`` are cut into slices of that size."""
        super().__init__(path)
        self._names: set[str] = set()
        self._slice = slice_bytes

    def add(self, name: str, array: Array) -> None:
        """Append one tensor. The format cannot hold an empty one (``UserError``)."""
        self.add_parts(TensorInfo(name, array.shape, array.dtype), (array,))

    def add_parts(self, info: TensorInfo, parts: Iterable[Array]) -> None:
        """Append one tensor that comes in consecutive ``parts`` (C order, any shapes); the same bytes as ``add``.

        Raises:
            UserError: the tensor is empty.
            ValueError: the name was written before, or the parts are not the ``info.nbytes`` announced.
        """
        if info.name in self._names:
            raise ValueError(f"'{info.name}' was written before")
        if info.nbytes == 0:
            raise UserError(
                f"'{info.name}' {info.shape} is empty: MindSpore's .ckpt cannot hold it; write .safetensors"
            )
        self._names.add(info.name)
        for done, data in checked_bytes(info, parts):
            while data:
                if done % self._slice == 0:
                    self._file.write(_slice_head(info, min(self._slice, info.nbytes - done)))
                piece = data[: self._slice - done % self._slice]
                self._file.write(piece)
                done += len(piece)
                data = data[len(piece) :]
            del data  # or it lives on while the next one is made


def _slice_head(info: TensorInfo, length: int) -> bytes:
    """What stands before ``length`` bytes of the tensor's data: keys, lengths, name, dims and type."""
    dims = b"".join(varint_field(1, size) for size in info.shape)
    head = dims + bytes_field(2, BY_NUMPY[info.dtype].mindspore.encode()) + varint(3 << 3 | BYTES) + varint(length)
    tag = bytes_field(1, info.name.encode("utf-8"))
    tensor = varint(2 << 3 | BYTES) + varint(len(head) + length) + head
    return varint(1 << 3 | BYTES) + varint(len(tag) + len(tensor) + length) + tag + tensor
