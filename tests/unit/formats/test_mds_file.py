# SPDX-License-Identifier: Apache-2.0
"""MDS folders: what streaming writes is read; an index or a shard that lies is refused in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.mds_file import MdsFolder
from tests.helpers.mds_writer import write_mds

COLUMNS = {"set": "str", "tokens": "bytes"}
ROWS = [np.arange(4) + 70 * number for number in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five rows in two shards."""
    write_mds(tmp_path / "cc", ROWS, "cc")
    return tmp_path / "cc"


def test_samples_come_in_order(folder: Path) -> None:
    found = MdsFolder(folder, COLUMNS)
    assert found.samples == 5 and len(found.shards) == 2
    samples = list(found.read())
    assert {sample["set"] for sample in samples} == {b"cc"}
    assert [np.frombuffer(sample["tokens"], "<u2").tolist() for sample in samples] == [row.tolist() for row in ROWS]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("version",), 3, "version 3 is not 2"),
        (("shards",), {}, "lists no shards"),
        (("shards", 0, "compression"), "zstd", "is compressed ('zstd')"),
        (("shards", 0, "zip_data"), {"basename": "x"}, "is compressed"),
        (("shards", 0, "format"), "json", "not in the format mds"),
        (("shards", 0, "raw_data", "basename"), "../shard.00000.mds", "no plain file name"),
        (("shards", 0, "raw_data", "basename"), "..", "no plain file name"),
        (("shards", 0, "raw_data", "basename"), "shard.00009.mds", "is missing"),
        (("shards", 0, "raw_data", "basename"), "shard.00001.mds", "listed twice"),
        (("shards", 0, "raw_data"), None, "no plain file name"),
        (("shards", 0, "samples"), -1, "has -1 samples"),
        (("shards", 0, "samples"), 4, "it has 3 samples, the index says 4"),
        (("shards", 0, "column_names"), ["tokens", "set"], "has the columns"),
        (("shards", 0, "column_encodings"), ["str", "pkl"], "has the columns"),
        (("shards", 0, "column_sizes"), [None, -2], "column_sizes"),
        (("shards", 0, "column_sizes"), [None, 8], "do not fit its"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, place: tuple, value: Any, message: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    inner = index
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        list(MdsFolder(folder, COLUMNS).read())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        (0, 2**32 - 1, "the index says 3"),
        (4, 0, "offsets beyond its end"),
        (8, 2**32 - 1, "offsets beyond its end"),
        (16, 2**32 - 1, "offsets beyond its end"),
    ],
)
def test_a_shard_that_lies_is_refused(folder: Path, at: int, number: int, message: str) -> None:
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    struct.pack_into("<I", data, at, number)
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=message):
        list(MdsFolder(folder, COLUMNS).read())


def test_huge_counts_take_no_memory(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["samples"] = 2**32 - 1
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard.00000.mds").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="4294967295 offsets are more than its 64 bytes hold"):
        list(MdsFolder(folder, COLUMNS).read())


def test_a_sample_whose_lengths_lie_and_links_are_refused(folder: Path) -> None:
    shard = folder / "shard.00001.mds"
    data = bytearray(shard.read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<I", data, start, 2**31)
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match="the lengths of sample 0 do not fit"):
        list(MdsFolder(folder, COLUMNS).read())
    shard.rename(folder / "away")
    shard.symlink_to(folder / "away")
    with pytest.raises(UserError, match="link"):
        MdsFolder(folder, COLUMNS)
