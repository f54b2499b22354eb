# SPDX-License-Identifier: Apache-2.0
"""JSON that others wrote: what is refused, before its memory is taken, and that the rest is read as Python's reader
does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import SETTINGS, Bounds, JsonError, TwiceError, parse_json, read_json, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.booleans())
def test_whole_texts_are_read_as_pythons_reader_does(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == parse_json(text.encode()) == value
    assert parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "line 1"),
        ("{", "column"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 100_000, "too deeply"),
        ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        ("9" * 65, "65 digits"),
        ('{"a": -' + "9" * 5000 + "}", "5001 digits"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\uDFFF": 1}', "surrogate"),
        ("[" + "[]," * 1_000_000 + "1]", "values, more than 1000000"),
        (b'"' + b"a" * SETTINGS.nbytes + b'"', "bytes are more than"),
    ],
)
def test_what_is_refused(text: str | bytes, word: str) -> None:
    with pytest.raises(JsonError, match=word):
        parse_json(text)


def test_a_whole_surrogate_pair_and_a_backslash_are_texts() -> None:
    assert parse_json(r'["\ud83d\ude00", "\\ud800"]') == ["\U0001f600", r"\ud800"]


def test_a_name_twice_is_found_in_a_large_object_at_once() -> None:
    names = ", ".join(f'"{number}": 0' for number in range(50_000))
    with pytest.raises(TwiceError, match="'49999'"):  # a count for each name would take minutes
        parse_json("{" + names + ', "49999": 1}')


def test_a_file_is_read_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2]}')
    assert read_object(path) == {"a": [1, 2]}
    with pytest.raises(UserError, match="bytes are more than 5.*mend it"):
        read_json(path, "mend it", Bounds(5, 5))
    path.write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        read_object(path)
    with pytest.raises(UserError, match="not a file"):
        read_json(tmp_path)
