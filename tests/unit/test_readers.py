# SPDX-License-Identifier: Apache-2.0
"""Readers find the files that are meant, in one order, and say which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.readers import find_files, read_documents, write_jsonl


def test_folder_glob_and_file_give_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("zwei\n\nzwei und halb", encoding="utf-8")
    write_jsonl(tmp_path / "deep" / "c.jsonl", ["drei\nZeilen", "vier é 漢"])
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    expected = ["zwei\n\nzwei und halb", "drei\nZeilen", "vier é 漢"]
    assert list(read_documents(str(tmp_path))) == expected
    assert list(read_documents(str(tmp_path / "**" / "*.[tj]*"))) == expected
    assert list(read_documents(str(tmp_path / "b.txt"))) == expected[:1]


def test_line_separators_other_than_newline_stay_inside_a_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one\u2028still one\x85 and so"])
    assert list(read_documents(str(tmp_path))) == ["one\u2028still one\x85 and so"]


def test_write_jsonl_leaves_nothing_beside(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ('\n\n{"body": "a"}\n', r'a\.jsonl, line 3: no string under "text"'),
        ('["a"]\n', r'line 1: no string under "text"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(read_documents(str(tmp_path)))


def test_what_is_not_there_or_not_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text file at"):
        find_files(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no text file at"):
        find_files(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"no reader for .*a\.pdf"):
        find_files(str(tmp_path / "a.pdf"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        list(read_documents(str(tmp_path / "latin.txt")))
