# SPDX-License-Identifier: Apache-2.0
"""MindRecord files, read without MindSpore: which fields their rows have, and rows of whole numbers.

The file begins with the length of a JSON text (8 bytes, little endian) and the text; rows follow in pages behind the
header. Where each row lies stands in the index beside the file (``.db``, SQLite). A row is the length of its data (8
bytes, little endian) and its fields in the header's order, each, where there are several, behind its length (8 bytes,
big endian). Whole numbers are packed since version 3.0: their count (4 bytes, big endian), two bits per number that
tell its width (1, 2, 4 or 8 bytes), and the numbers (little endian).
"""

from __future__ import annotations

import mmap
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import parse_json

LONGEST_HEADER = 1 << 24  # bytes; the writer's own default
HELD_ROWS = 1 << 20  # places of so many rows are held, 16 MiB; those of a larger file are looked up one by one
FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)  # of a header with other kinds


def record_fields(path: Path) -> dict[str, str]:
    """Type by name of the fields of every row, for example ``{"input_ids": "int32", "labels": "int32"}``.

    Raises:
        UserError: no such file, or not a MindRecord.
    """
    if not path.is_file():
        what = "is a folder: give one of its files" if path.is_dir() else "does not exist: give a .mindrecord file"
        raise UserError(f"{path} {what}")
    if path.suffix == ".db":
        raise UserError(f"{path} is the index of a MindRecord: give {path.stem}")
    try:
        described = _header(path)["schema"][0]["schema"]
        return {str(name): str(field["type"]) for name, field in described.items()}
    except FAULTS as error:
        raise _no_record(path) from error


def _no_record(path: Path) -> UserError:
    return UserError(
        f"{path} is not a MindRecord (its header cannot be read): give a file that llama_preprocess.py wrote"
    )


def _header(path: Path) -> Any:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if 0 < length <= LONGEST_HEADER else b""
    return parse_json(head)


class MindRecordFile:
    """Rows of a MindRecord by number, in the order of the file. Reads what MindSpore or our tools wrote.

    Raises:
        UserError: no such file or index, another kind of file, or fields that are no whole numbers.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path``; its index ``<path>.db`` must lie beside it."""
        self.path = path
        kinds = record_fields(path)
        head = _header(path)
        try:
            self.fields: tuple[str, ...] = tuple(head["schema"][0].get("blob_fields") or ())
            wrong = [f"{name} is {kinds[name]}" for name in self.fields if kinds[name] not in ("int32", "int64")]
            pages = int(head["header_size"]), int(head["page_size"])
        except FAULTS as error:
            raise _no_record(path) from error
        if wrong or not self.fields:
            raise UserError(f"{path}: {', '.join(wrong) or 'no field is an array'}: rows of token ids are int32")
        self._types = {name: np.dtype(kinds[name]) for name in self.fields}
        self._packed = str(head.get("version", "")) >= "3.0"
        self._places: npt.NDArray[np.int64] | _LookedUp
        if row_count(path) > HELD_ROWS:
            self._places = _LookedUp(path, *pages)
        else:
            self._places = _places(path, *pages)
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        """Rows of the file."""
        return len(self._places)

    def read(self, row: int, fields: Sequence[str]) -> tuple[npt.NDArray[np.int32], ...]:
        """The ``fields`` of one row, each an int32 array of one dimension."""
        start, end = self._places[row]
        blob = self._data[start:end]
        length = int.from_bytes(blob[:8], "little")
        if length + 8 != len(blob):
            raise UserError(f"{self.path}: row {row} is damaged: write or copy the data again")
        columns = self._columns(blob[8:])
        return tuple(self._numbers(columns[name], self._types[name], row) for name in fields)

    def _columns(self, blob: bytes) -> dict[str, bytes]:
        if len(self.fields) == 1:
            return {self.fields[0]: blob}
        found, at = {}, 0
        for name in self.fields:
            length = int.from_bytes(blob[at : at + 8], "big")
            found[name] = blob[at + 8 : at + 8 + length]
            at += 8 + length
        return found

    def _numbers(self, data: bytes, kind: np.dtype[Any], row: int) -> npt.NDArray[np.int32]:
        if not self._packed:
            return np.frombuffer(data, kind.newbyteorder("<")).astype(np.int32)
        try:
            return unpacked(data)
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.path}: row {row} is damaged: write or copy the data again") from error

    def close(self) -> None:
        """Let go of the file."""
        self._data.close()
        if isinstance(self._places, _LookedUp):
            self._places.close()


def unpacked(data: bytes) -> npt.NDArray[np.int32]:
    """Packed whole numbers as int32; ``ValueError`` or ``IndexError`` for what was not packed so."""
    count = int.from_bytes(data[:4], "big")
    first = 4 + (count + 3) // 4
    bits = np.frombuffer(data, np.uint8, first - 4, 4)
    kinds = ((bits[:, None] >> np.array([6, 4, 2, 0], np.uint8)) & 3).reshape(-1)[:count]
    width = np.left_shift(1, kinds.astype(np.int64))
    start = first + np.cumsum(width) - width
    source = np.frombuffer(data, np.uint8)
    if count and int(start[-1] + width[-1]) != len(data):
        raise ValueError(f"{len(data)} bytes for {count} numbers")
    result = np.empty(count, np.int32)
    for kind, dtype in enumerate(("<i1", "<i2", "<i4", "<i8")):
        chosen = np.flatnonzero(kinds == kind)
        if chosen.size:
            pieces = source[start[chosen, None] + np.arange(1 << kind)]
            result[chosen] = np.ascontiguousarray(pieces).view(dtype)[:, 0]
    return result


def row_count(path: Path) -> int:
    """Rows of the MindRecord at ``path``, from its index; an index that cannot be read is a ``UserError``."""
    with _open_index(path) as index:
        return int(index.execute("select count(*) from INDEXES").fetchone()[0])


@contextmanager
def _open_index(path: Path) -> Iterator[sqlite3.Connection]:
    """The index of ``path``, read only. What SQLite computes instead of reading it (views, columns made from others)
    may be endless and is refused."""
    index = path.with_name(path.name + ".db")
    if not index.is_file():
        raise UserError(f"no MindRecord at {path}: the file and its index {index.name} must both be there")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(index))}?mode=ro", uri=True, check_same_thread=False)) as found:
            found.execute("pragma trusted_schema = off")
            kind = found.execute("select type from sqlite_master where upper(name) = 'INDEXES'").fetchall()
            computed = [row for row in found.execute("pragma table_xinfo(INDEXES)") if row[6]]
            if kind != [("table",)] or computed:
                raise UserError(f"the index {index.name} of {path} has no plain table INDEXES: write the data again")
            yield found
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the index {index.name} of {path} cannot be read ({error}): write the data again") from error


_PLACE = "PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END"


def _places(path: Path, header: int, page: int) -> npt.NDArray[np.int64]:
    """Start and end (rows, 2) of every row in the file, all of them inside it."""
    with _open_index(path) as index:
        found = index.execute(f"select {_PLACE} from INDEXES order by ROW_ID")
        numbers = np.fromiter((value for row in found for value in row), np.int64)
    return _inside(numbers.reshape(-1, 3), path, header, page)


def _inside(rows: npt.NDArray[np.int64], path: Path, header: int, page: int) -> npt.NDArray[np.int64]:
    """Start and end (rows, 2) of rows given as page, start and end in it (rows, 3); ``UserError`` if one is outside."""
    size = path.stat().st_size
    inside = 0 <= header <= size and page >= 0 and bool(((rows >= 0) & (rows <= size)).all())
    inside = inside and bool((rows[:, 0] <= size // max(page, 1)).all())  # so no product is beyond an int64
    places = header + page * rows[:, :1] + rows[:, 1:] if inside else np.empty((0, 2), np.int64)
    if not inside or (places > size).any() or (places[:, 0] > places[:, 1]).any():
        raise UserError(f"{path} is shorter than its index says: copy the pair again")
    return places


class _LookedUp:
    """The same, one row at a time and none of them kept: memory does not grow with the file."""

    def __init__(self, path: Path, header: int, page: int) -> None:
        self._path, self._pages, self._open = path, (header, page), ExitStack()
        self._index = self._open.enter_context(_open_index(path))
        first, last, self._rows = self._index.execute(
            "select min(ROW_ID), max(ROW_ID), count(*) from INDEXES"
        ).fetchone()
        if (first, last) != (0, self._rows - 1):
            self.close()
            raise UserError(f"the index of {path} does not number its rows from 0: write the data again")

    def __len__(self) -> int:
        return int(self._rows)

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        try:
            found = self._index.execute(f"select {_PLACE} from INDEXES where ROW_ID = ?", (int(row),)).fetchall()
            numbers = np.array(found, np.int64).reshape(1, 3)
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"row {row} of {self._path} is not in its index: write the data again") from error
        return _inside(numbers, self._path, *self._pages).reshape(2)

    def close(self) -> None:
        self._open.close()
