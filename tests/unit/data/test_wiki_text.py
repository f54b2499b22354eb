# SPDX-License-Identifier: Apache-2.0
"""Cleaning WikiText in a stream gives what cleaning the whole text at once gives."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.data.readers import Cutting, read_wiki
from mindformers_ext.data.wiki_text import AFTER, BEFORE, PAIRS, clean, clean_stream, count_closers

ALPHABET = "()[]{}\"'  \n=@-.,sN:;?!a\xb0\xa0"
# What MindFormers r1.7's wikitext_clean and its paragraph rule give for the WikiText-2 validation split: characters of
# the cleaned text, its hash, paragraphs trained on, their hash (joined by "\0"); made by running that function.
GOLDEN = (
    1076890,
    "690623f8b014db8936214a63f29caee6503f4b9a21f0e883957c278868a9be34",
    533,
    "994e526fde3a59ed73a0154a12057ecff56a7972715abbaa6a64759854050a93",
)


def at_once(text: str) -> str:
    """The rules as regular expressions over the whole text."""
    for old, new in BEFORE:
        text = text.replace(old, new)
    for first, last in PAIRS:
        inner = rf"{re.escape(first)}\s*([^{re.escape(last)}]*?)\s*{re.escape(last)}"
        text = re.sub(inner, lambda match, a=first, b=last: a + match[1] + b, text)
    for old, new in AFTER:
        text = text.replace(old, new)
    return text


@settings(max_examples=400)
@given(st.lists(st.text(alphabet=ALPHABET, max_size=9), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same(chunks: list[str]) -> None:
    text = "".join(chunks)
    closers = {pair[1]: text.count(pair[1]) for pair in PAIRS}
    assert "".join(clean_stream(chunks, closers)) == at_once(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" = Title = \n \n 5 @-@ year , 1 @,@ 000 men . \n", " = Title =\n\n5-year, 1,000 men.\n"),
        ('He said " yes " ( or no ) .', 'He said "yes" (or no) .'),
        ("never ( closed", "never ( closed"),
        ("a ( b ( c ) d ) e", "a (b ( c) d ) e"),
        ("the dogs ' tails , it 's N of", "the dogs'tails, it's 1 of"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_a_pair_may_span_the_file(tmp_path: Path) -> None:
    text = "a ( " + "long text \n" * 300_000 + " ) b ( c"
    (tmp_path / "wiki.tokens").write_text(text, encoding="utf-8")
    assert count_closers(tmp_path / "wiki.tokens") == {")": 1, "]": 0, "}": 0, '"': 0, "'": 0}
    fragments = list(read_wiki(tmp_path / "wiki.tokens", Cutting()))
    assert [item.last for item in fragments].index(True) == len(fragments) - 1 > 700
    read = fragments[0].text + "".join(" " * (not item.glued) + item.text for item in fragments[1:])
    same = read == clean(text)  # not in the assert: a difference would be printed in full
    assert same and read.startswith("a (long text\nlong") and read.endswith("text) b ( c")


def test_wikitext_as_mindformers_cleans_it(wiki_file: Path) -> None:
    cleaned = clean(wiki_file.read_text(encoding="utf-8"))
    paragraphs = [item.text for item in read_wiki(wiki_file, Cutting(limit=10**9))]
    joined = "\0".join(paragraphs).encode()
    found = (len(cleaned), sha256(cleaned.encode()).hexdigest(), len(paragraphs), sha256(joined).hexdigest())
    assert found == GOLDEN
