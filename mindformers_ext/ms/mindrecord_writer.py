# SPDX-License-Identifier: Apache-2.0
"""A process that writes MindRecord files while others tokenise.

It loads ``mindspore.mindrecord`` alone, without the rest of MindSpore: 0.3 s and 260 MB instead of 1.3 s and 400 MB
(2.9.0). Where that fails, in another version, a second process loads MindSpore as usual.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.core.errors import UserError

# MindRecord makes its index page by page, with all rows of a page in memory: pages of its default 32 MB cost 800 MB for
# 400,000 short rows. A page must hold a row, and should hold several.
PAGE_BYTES, PAGE_ROWS, LARGEST_PAGE = 1 << 20, 8, 1 << 28
READY, DONE, FAILED = "ready", "done", "failed"


class _File(NamedTuple):
    """What is written next: ``fields`` are arrays, ``numbers`` (name -> type) single values of a row."""

    path: Path
    fields: tuple[str, ...]
    numbers: Mapping[str, str]
    shards: int
    page: int


class MindRecordWriter:
    """See ``jobs.engine.protocols.RecordWriter``."""

    def __init__(
        self,
        path: Path,
        fields: tuple[str, ...],
        shards: int,
        row_length: int,
        numbers: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process; what it needs is loaded while the caller goes on."""
        self.path, self.rows = path, 0
        self._job = _File(path, fields, dict(numbers or {}), shards, page_bytes(row_length * len(fields) * 4))
        self._start(light=True)
        self._ready = False

    def write(self, block: Mapping[str, np.ndarray]) -> None:
        """Append rows: one int32 array of shape (rows, length) per field, one of shape (rows,) per number."""
        self._wait_until_ready()
        try:
            self._connection.send(dict(block))
        except OSError as error:
            raise self._failure() from error
        self.rows += len(next(iter(block.values())))

    def close(self) -> int:
        """Finish the files; returns how many rows they hold."""
        rows = self.finish()
        self._connection.close()
        self._process.join()
        return rows

    def begin(self, path: Path) -> None:
        """Another file like the finished one, in the same process."""
        self.path, self.rows, self._job, self._ready = path, 0, self._job._replace(path=path), False
        try:
            self._connection.send(self._job)
        except OSError as error:
            raise self._failure() from error

    def finish(self) -> int:
        """Finish the files, and keep the process for another; returns how many rows they hold."""
        self._wait_until_ready()
        try:
            self._connection.send(None)
        except OSError as error:
            raise self._failure() from error
        word, what = self._receive()
        if word != DONE:
            raise self._failure(what)
        return self.rows

    def abort(self) -> None:
        """End the process; what was written is incomplete."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _start(self, light: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, light, self._job), daemon=True)
        self._process.start()
        child.close()

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        word, what = self._receive()
        if word != READY:
            self.abort()
            self._start(light=False)
            word, what = self._receive()
        if word != READY:
            raise self._failure(what)
        self._ready = True

    def _receive(self) -> tuple[str, str]:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return FAILED, ""

    def _failure(self, what: str = "") -> UserError:
        if not what and self._connection.poll():
            what = self._receive()[1]
        why = " ".join(what.split())[:300] or "its process ended, perhaps for want of memory"
        return UserError(f"{self.path} could not be written: {why}; see that the disk has room, and run it again")


def page_bytes(row: int) -> int:
    """Bytes of a page for rows of ``row`` bytes: a power of two."""
    needed = max(PAGE_BYTES, row * PAGE_ROWS)
    return min(1 << (needed - 1).bit_length(), LARGEST_PAGE)


def _serve(connection: Connection, light: bool, file: _File) -> None:
    """The process: blocks come in, None ends the file, another file may follow. Nothing is left to do at exit, and
    MindSpore's own steps there would miss the parts that were not loaded."""
    code = 1
    try:
        while True:
            _write_file(connection, light, file)
            code = 0
            file = connection.recv()
            code = 1
    except EOFError:  # the last file is finished, or the command was ended
        pass
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, LookupError, OSError) as error:
        connection.send((FAILED, f"{type(error).__name__}: {error}"))
    finally:
        connection.close()
        os._exit(code)


def _write_file(connection: Connection, light: bool, file: _File) -> None:
    writer = _writer(light, file)
    connection.send((READY, ""))
    pending: list[dict[str, np.ndarray]] = []
    names = (*file.fields, *file.numbers)
    while (block := connection.recv()) is not None:
        columns = [block[name] for name in names]
        pending += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        # MindSpore deals rows evenly to the shards, and what is left over to shards that it draws at random
        even = len(pending) // file.shards * file.shards
        if even:
            writer.write_raw_data(pending[:even])
            del pending[:even]
    if pending:
        writer.write_raw_data(pending)
    writer.commit()
    connection.send((DONE, ""))


def _writer(light: bool, file: _File) -> Any:
    os.environ.setdefault("GLOG_v", "4")
    found = importlib.util.find_spec("mindspore") if light and "mindspore" not in sys.modules else None
    if found is not None and found.submodule_search_locations:
        package = ModuleType("mindspore")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["mindspore"] = package
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(file_name=str(file.path), shard_num=file.shards, overwrite=False)
    writer.set_page_size(file.page)
    arrays = {name: {"type": "int32", "shape": [-1]} for name in file.fields}
    writer.add_schema({**arrays, **{name: {"type": kind} for name, kind in file.numbers.items()}}, "token rows")
    return writer
