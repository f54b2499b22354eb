# SPDX-License-Identifier: Apache-2.0
"""Indexes of MindRecord files that would run for ever, or lie, are refused before a row is read."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.mindrecord_file import MindRecordFile, row_count

COLUMNS = "ROW_ID INT, PAGE_ID_BLOB INT, PAGE_OFFSET_BLOB INT, PAGE_OFFSET_BLOB_END INT"
ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select i as ROW_ID, 0 as PAGE_ID_BLOB from n"
TABLE = f"create table INDEXES ({COLUMNS})"
HEAD = (
    '{"header_size": 4096, "page_size": 4096, "version": "3.0", '
    '"schema": [{"blob_fields": ["input_ids"], "schema": {"input_ids": {"type": "int32"}}}]}'
)
HOSTILE = {
    "an endless view": [f"create view INDEXES as {ENDLESS}"],
    "a computed column": ["create table INDEXES (ROW_ID INT, PAGE_ID_BLOB as (zeroblob(1000000000)))"],
    "no table": ["create table OTHER (a)"],
    "texts": [TABLE, "insert into INDEXES values (0, 'a', 'b', 'c')"],
    "nulls": [TABLE, "insert into INDEXES values (0, null, 0, 0)"],
    "blobs": [TABLE, "insert into INDEXES values (0, x'00', 0, 0)"],
    "a page beyond the file": [TABLE, "insert into INDEXES values (0, 4611686018427387904, 0, 8)"],
    "an end before its start": [TABLE, "insert into INDEXES values (0, 0, 16, 8)"],
    "a negative place": [TABLE, "insert into INDEXES values (0, 0, -8, 8)"],
}


def pair(folder: Path, statements: list[str]) -> Path:
    path = folder / "a.mindrecord"
    path.write_bytes(len(HEAD).to_bytes(8, "little") + HEAD.encode() + bytes(8192))
    with closing(sqlite3.connect(folder / "a.mindrecord.db")) as index, index:
        for statement in statements:
            index.execute(statement)
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_that_lies_is_refused(kind: str, tmp_path: Path) -> None:
    path = pair(tmp_path, HOSTILE[kind])
    with pytest.raises(UserError, match="index"):
        MindRecordFile(path)
    if "table INDEXES" not in HOSTILE[kind][0] or "zeroblob" in HOSTILE[kind][0]:
        with pytest.raises(UserError, match="no plain table INDEXES"):
            row_count(path)


def test_a_plain_index_is_read(tmp_path: Path) -> None:
    path = pair(tmp_path, [TABLE, "insert into INDEXES values (0, 0, 0, 8), (1, 0, 8, 24)"])
    assert row_count(path) == len(MindRecordFile(path)) == 2


@pytest.mark.parametrize(
    "changed", ['"header_size": [1]', '"page_size": null', '"blob_fields": 5', '"blob_fields": [5]']
)
def test_a_header_of_other_kinds_is_refused(changed: str, tmp_path: Path) -> None:
    name = changed.partition(":")[0]
    at = HEAD.index(name)
    end = min(HEAD.index(sign, at + len(name)) for sign in ("]" if "blob" in name else ",",))
    head = HEAD[:at] + changed + HEAD[end + ("blob" in name) :]
    path = pair(tmp_path, [TABLE])
    path.write_bytes(len(head).to_bytes(8, "little") + head.encode() + bytes(8192))
    with pytest.raises(UserError, match="not a MindRecord"):
        MindRecordFile(path)
