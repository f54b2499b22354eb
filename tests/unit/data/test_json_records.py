# SPDX-License-Identifier: Apache-2.0
"""JSON lists and JSON lines read piece by piece: the same objects as json.load gives, and errors that name the line."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data import text_lines
from mindformers_ext.data.json_records import read_records

TEXTS = ["", "a", '{["]},\\', "é漢\U0001f600", "two\nlines", "x" * 50]


def make_records(count: int) -> list[dict[str, object]]:
    chance = random.Random(count)
    return [
        {name: chance.choice(TEXTS) for name in chance.sample(string.ascii_letters, 3)} | {"n": [1.5, None, {}]}
        for _ in range(count)
    ]


def as_list(records: list[dict[str, object]], **more: object) -> str:
    return json.dumps(records, **more)


def as_lines(records: list[dict[str, object]], **more: object) -> str:
    return "\n\r\n".join(json.dumps(record, **more) for record in records)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("write", [as_list, as_lines])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_chunk_size_gives_what_json_gives(tmp_path, monkeypatch, chunk, write, ascii_only) -> None:
    monkeypatch.setattr(text_lines, "CHUNK", chunk)
    records, path = make_records(40), tmp_path / "a.json"
    path.write_bytes(f" \n{write(records, ensure_ascii=ascii_only)}\n".encode("utf-8-sig"))
    read: list[int] = []
    found = list(read_records(path, read.append))
    assert [record.value for record in found] == records
    assert [record.number for record in found] == list(range(1, 41))
    assert sum(read) == path.stat().st_size
    assert [record.line for record in found] == ([2] * 40 if write is as_list else list(range(2, 82, 2)))


def test_lines_of_an_indented_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=2), encoding="utf-8")
    assert [record.where for record in read_records(path)] == [
        f"{path}, record 1 (line 2)",
        f"{path}, record 2 (line 5)",
    ]


BAD = [
    (b"", "is empty"),
    (b" \n\t\n", "is empty"),
    (b"[]", "empty list"),
    (b"[ ]\n[", "line 2: there is text after the list's ']'"),
    (b"hello", "line 1: found 'h'; a JSON list begins"),
    (b'[{"a": 1},\n {"a": 2]', "line 2: not JSON|line 2: the file ends inside"),
    (b'[{"a": 1},\n {"a": "2', r"line 2: the file ends inside a record \(Unterminated"),
    (b'[{"a": 1},\n {"a": \n\n tru' + b" " * 99 + b"}]", r"line 4: not JSON .*the record begins in line 2"),
    (b'[{"a": 1},\n {"a": "x\ny' + b" " * 99 + b'"}]', "line 2: not JSON .*control character"),
    (b'[{"a": 1}\n {"a": 2}]', "line 2: found '{', expected ',' or ']'"),
    (b'[{"a": 1},\n]', "line 2: found ']' after a comma"),
    (b'[{"a": 1},\n7]', "line 2: found '7', expected an object"),
    (b'[{"a": 1},\n', "line 2: the file ends, expected an object"),
    (b'[{"a": 1}', "line 1: the file ends, expected ',' or"),
    (b'[{"a": 1},\n{"b": 1, "b": 2}]', "line 2: the record holds the name 'b' twice"),
    (b'[\n{"a": ' + b"[" * 200_000, "line 2: the record is nested too deeply"),
    (b'{"a": 1}\n\n{"a": }\n', r"line 3: not JSON \(Expecting value, column 7\)"),
    (b'{"a": 1}\n{"a": "2', "line 2: not JSON"),
    (b'{"a": 1}\n{"a": 2} {"a": 3}', "line 2: there is text after the object"),
    (b'{"a": 1}\n[2]', r"line 2: found '\['"),
    (b'{\n "a": 1\n}', "line 1: not JSON .*one whole object a line"),
    (b'{"a": 1}\n{"b": 1, "b": 2}', "line 2: the record holds the name 'b' twice"),
    (b'{"a": 1}\n{"a": "\xff"}', "line 2: not UTF-8"),
    (b'[{"a": 1},\n\n{"a": "\xe6\xbc', "line 3: not UTF-8"),
]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(("data", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_spoiled_files(tmp_path: Path, monkeypatch, chunk: int, data: bytes, message: str) -> None:
    monkeypatch.setattr(text_lines, "CHUNK", chunk)
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)


def test_a_field_that_is_no_string_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x"}\n{"a": null, "b": "\\ud800"}\n', encoding="utf-8")
    first, second = read_records(path)
    assert first.text("a") == "x"
    with pytest.raises(UserError, match=r"record 1 \(line 1\): no field 'b', it has 'a'"):
        first.text("b")
    with pytest.raises(UserError, match=r"record 2 \(line 2\): 'a' is null; give it a text"):
        second.text("a")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        second.text("b")


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        list(read_records(tmp_path / "none.json"))
    with pytest.raises(UserError, match="cannot read"):
        list(read_records(tmp_path))


def test_a_window_stays_small(tmp_path: Path) -> None:
    """40 MB read in windows: far less than the file is in memory."""
    import tracemalloc

    path = tmp_path / "large.json"
    line = json.dumps({"text": "word " * 2000})
    with path.open("w", encoding="utf-8") as file:
        file.write("[" + ",\n".join([line] * 4000) + "]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 4000 and path.stat().st_size > 40_000_000
    assert peak < 10_000_000
