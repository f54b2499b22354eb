# SPDX-License-Identifier: Apache-2.0
"""The corpus that every machine has: real text, no text twice, the same on every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ext.data.corpus import docstrings, split_held_out, standard_library_text


@pytest.fixture(scope="module")
def text() -> list[str]:
    return list(standard_library_text(700_000))


def test_same_documents_again(text: list[str]) -> None:
    assert list(standard_library_text(700_000)) == text


def test_the_limit_is_passed_by_the_last_document_only(text: list[str]) -> None:
    sizes = [len(document.encode()) for document in text]
    assert sum(sizes[:-1]) < 700_000 <= sum(sizes)


def test_no_document_twice_and_none_tiny(text: list[str]) -> None:
    assert len(set(text)) == len(text)
    assert min(map(len, text)) > 20


def test_it_is_english_prose(text: list[str]) -> None:
    words = " ".join(text).split()
    assert sum(word in {"the", "a", "of", "is", "to", "and", "in"} for word in words) / len(words) > 0.1


def test_docstrings_in_source_order(tmp_path: Path) -> None:
    long = "that is long enough to be worth reading, unlike most."
    source = tmp_path / "m.py"
    source.write_text(f'''"""Module {long}"""
class A:
    """Class {long}"""
    def f(self):
        """Short."""
''')
    assert list(docstrings(source)) == [f"Module {long}", f"Class {long}"]
    source.write_text("def broken(:\n")
    assert list(docstrings(source)) == []


def test_held_out_documents_are_spread_and_disjoint() -> None:
    train, held_out = split_held_out([str(number) for number in range(10)], every=4)
    assert held_out == ["3", "7"]
    assert train == ["0", "1", "2", "4", "5", "6", "8", "9"]
