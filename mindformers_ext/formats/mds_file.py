# SPDX-License-Identifier: Apache-2.0
"""MDS folders (mosaicml-streaming), read without the streaming package: ``index.json`` and shards of samples.

A shard begins with the number of samples n (4 bytes, little endian) and n + 1 absolute offsets (4 bytes each); a sample
is the length of each column of variable size (4 bytes each, in the order of the names) and the columns' bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import TABLES, read_object
from mindformers_ext.core.plain_file import refuse_other

INDEX, VERSION = "index.json", 2
ADVICE = "copy the folder again, or write it again with streaming's MDSWriter"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


@dataclass(frozen=True)
class MdsShard:
    """A shard: its file, samples, and the sizes of its columns in order (None: variable)."""

    path: Path
    samples: int
    columns: tuple[str, ...]
    sizes: tuple[int | None, ...]


class MdsFolder:
    """The samples of an MDS folder, in order.

    Raises:
        UserError: no index, another version, compressed shards, names that lead out of the folder, or other columns.
    """

    def __init__(self, folder: Path, columns: dict[str, str]) -> None:
        """``columns``: the encoding of every column that is there, by name, such as ``{"tokens": "bytes"}``."""
        self.folder, self.path = folder, folder / INDEX
        refuse_other(self.path)
        value = read_object(self.path, ADVICE, TABLES)
        if value.get("version") != VERSION:
            raise self._wrong(f"version {value.get('version')!r:.40} is not {VERSION}")
        listed = value.get("shards")
        if not isinstance(listed, list):
            raise self._wrong("it lists no shards")
        self.shards = [self._shard(number, item, columns) for number, item in enumerate(listed)]
        names = [shard.path.name for shard in self.shards]
        if len(set(names)) < len(names):
            raise self._wrong("a shard is listed twice")

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def read(self) -> Iterator[dict[str, bytes]]:
        """Every sample: the bytes of each column."""
        for shard in self.shards:
            yield from read_shard(shard)

    def _wrong(self, what: str) -> UserError:
        return UserError(f"'{self.path}': {what}: {ADVICE}")

    def _shard(self, number: int, item: Any, columns: dict[str, str]) -> MdsShard:
        where = f"shard {number}"
        if not isinstance(item, dict) or item.get("format") != "mds":
            raise self._wrong(f"{where} is not in the format mds")
        if item.get("compression") is not None or item.get("zip_data") is not None:
            raise UserError(
                f"'{self.path}': {where} is compressed ({item.get('compression')!r:.40}): write the folder without "
                "compression, or unpack it with streaming"
            )
        raw, samples, sizes = item.get("raw_data"), item.get("samples"), item.get("column_sizes")
        name = raw.get("basename") if isinstance(raw, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self._wrong(f"{where} has the name {name!r:.80}, which is no plain file name")
        if not isinstance(samples, int) or isinstance(samples, bool) or not 0 <= samples < 2**32:
            raise self._wrong(f"{where} has {samples!r:.40} samples")
        names, kinds = item.get("column_names"), item.get("column_encodings")
        if names != sorted(columns) or kinds != [columns[column] for column in sorted(columns)]:
            raise self._wrong(f"{where} has the columns {names!r:.80} of {kinds!r:.80}, wanted are {columns}")
        if not isinstance(sizes, list) or len(sizes) != len(columns):
            raise self._wrong(f"{where} has the column_sizes {sizes!r:.80}")
        if not all(size is None or (type(size) is int and 0 <= size < 2**32) for size in sizes):
            raise self._wrong(f"{where} has the column_sizes {sizes!r:.80}")
        path = self.folder / name
        refuse_other(path)
        if not path.is_file():
            raise self._wrong(f"{where}, '{name}', is missing")
        return MdsShard(path, samples, tuple(names), tuple(sizes))


def read_shard(shard: MdsShard) -> Iterator[dict[str, bytes]]:
    """The samples of a shard; a ``UserError`` for counts, offsets and lengths beyond its end."""

    def damaged(what: str) -> UserError:
        return UserError(f"'{shard.path}' is damaged ({what}): {ADVICE}")

    with shard.path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        count = int.from_bytes(file.read(4), "little")
        if count != shard.samples:
            raise damaged(f"it has {count} samples, the index says {shard.samples}")
        if 4 + 4 * (count + 1) > size:
            raise damaged(f"{count} offsets are more than its {size} bytes hold")
        offsets = np.frombuffer(file.read(4 * (count + 1)), "<u4").astype(np.int64)
        if (np.diff(offsets) < 0).any() or offsets[0] < 4 + 4 * (count + 1) or offsets[-1] > size:
            raise damaged("offsets beyond its end, or not in order")
        for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            file.seek(int(start))
            data = file.read(int(end - start))
            sample = _columns(shard, data)
            if sample is None:
                raise damaged(f"the lengths of sample {number} do not fit its {len(data)} bytes")
            yield sample


def _columns(shard: MdsShard, data: bytes) -> dict[str, bytes] | None:
    variable = [name for name, size in zip(shard.columns, shard.sizes, strict=True) if size is None]
    at = 4 * len(variable)
    if len(data) < at:
        return None
    lengths = dict(zip(variable, np.frombuffer(data[:at], "<u4").tolist(), strict=True))
    found = {}
    for name, size in zip(shard.columns, shard.sizes, strict=True):
        length = lengths[name] if size is None else size
        found[name] = data[at : at + length]
        at += length
    return found if at == len(data) else None
