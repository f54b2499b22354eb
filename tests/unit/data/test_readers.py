# SPDX-License-Identifier: Apache-2.0
"""Readers find the files that are meant, give documents in fragments that lose nothing, and say which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.readers import (
    Cutting,
    Fragment,
    cut,
    find_files,
    read_chunks,
    read_jsonl,
    read_text,
    write_jsonl,
)

WHOLE = Cutting()
SHORT = Cutting(limit=10)


def documents(fragments: list[Fragment], blank: bool = True) -> list[str]:
    """The texts that the fragments are parts of."""
    result: list[str] = []
    for item in fragments:
        if item.first:
            assert not item.glued
            result.append(item.text)
        else:
            result[-1] += (" " if blank and not item.glued else "") + item.text
    return result


def test_folder_glob_and_file_give_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    found = [tmp_path / name for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert find_files(str(tmp_path), (".txt",)) == found
    assert find_files(str(tmp_path / "**" / "*.txt")) == found
    assert find_files(str(tmp_path / "b.txt"), (".json",)) == found[1:2]  # a file that is named is meant


def test_what_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    for pattern in ("missing.txt", "*.txt", "."):
        with pytest.raises(UserError, match="no input file at"):
            find_files(str(tmp_path / pattern), (".txt",))
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n"]),
        ("paragraph", ["one\ntwo", "three\n"]),
        ("line", ["one", "two", "three"]),
    ],
)
def test_what_a_document_is(tmp_path: Path, document: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\nthree\r")
    assert [item.text for item in read_text(tmp_path / "a.txt", document, WHOLE)] == expected


def test_bad_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"first\nsecond\ncaf\xe9 au lait\n")
    with pytest.raises(UserError, match=r"latin\.txt, line 3: not UTF-8"):
        list(read_chunks(tmp_path / "latin.txt"))


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 700_000, encoding="utf-8")
    seen: list[int] = []
    assert len("".join(read_chunks(tmp_path / "a.txt", seen.append))) == 700_000
    assert sum(seen) == 1_400_000 and len(seen) > 1


@given(st.text(alphabet="ab .<>\n中é", max_size=200), st.booleans(), st.integers(2, 30))
def test_cutting_loses_nothing(text: str, blank: bool, limit: int) -> None:
    fragments = list(cut(text, Cutting(limit, blank)))
    assert documents(fragments, blank) == [text]
    assert [item.first for item in fragments] == [True] + [False] * (len(fragments) - 1)
    assert [item.last for item in fragments] == [False] * (len(fragments) - 1) + [True]
    assert all(len(item.text) <= limit for item in fragments)


def test_cuts_stand_between_words_where_there_are_words() -> None:
    assert list(cut("alpha beta gamma", SHORT)) == [Fragment("alpha", True, False), Fragment("beta gamma", False, True)]
    assert [item.glued for item in cut("中" * 25, SHORT)] == [False, True, True]
    assert [item.text for item in cut("x" * 8 + "<unk>", SHORT)] == ["x" * 8, "<unk>"]


@pytest.mark.parametrize("unit", ["word ", "中文。", "word\n", " \n"])
def test_a_document_larger_than_memory_comes_in_parts(tmp_path: Path, unit: str) -> None:
    text = "start " + unit * (3_000_000 // len(unit)) + "end\n\nnext"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for document, expected in (("file", [text]), ("paragraph", text.split("\n\n"))):
        fragments = list(read_text(tmp_path / "a.txt", document, WHOLE))
        assert max(len(item.text) for item in fragments) <= WHOLE.limit
        assert documents(fragments) == expected
        assert sum(item.last for item in fragments) == len(expected)


def test_jsonl_takes_the_field_asked_for(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one\u2028still one\x85 and so", "zwei"])
    texts = [item.text for item in read_jsonl(tmp_path / "a.jsonl", "text", WHOLE)]
    assert texts == ["one\u2028still one\x85 and so", "zwei"]
    with pytest.raises(UserError, match=r"a\.jsonl, record 1 \(line 1\): no field 'body', it has 'text'"):
        list(read_jsonl(tmp_path / "a.jsonl", "body", WHOLE))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]  # written beside, nothing left
