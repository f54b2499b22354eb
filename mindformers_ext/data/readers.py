# SPDX-License-Identifier: Apache-2.0
"""Readers: files in, documents out in fragments of bounded size, so that no file needs to fit into memory.

A document longer than ``limit`` characters is cut where its tokens do not change: at a single blank between two letters
or digits. A tokenizer that puts a blank before every text (LLaMA's) gives the rest the blank that was cut away. Only a
text without such a place, Chinese for example, is cut anywhere, and its next fragment is marked as ``glued``.
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.json_records import read_records
from mindformers_ext.data.text_lines import decoded, suffix_of
from mindformers_ext.data.wiki_text import clean_stream, count_closers, is_heading
from mindformers_ext.formats.atomic import fresh_file

FRAGMENT = 4096  # characters; SentencePiece's time per token grows with the text's length
PENDING = 1 << 18  # characters of an unfinished document that wait for its end
LONGEST_MARK = 16  # characters before a cut in which no special token like <unk> may begin

Progress = Callable[[int], object]
SEPARATORS = {"file": None, "paragraph": "\n\n", "line": "\n"}  # --document of plain text


class Fragment(NamedTuple):
    """A document or a part of one. ``glued``: follows the fragment before without a blank in between."""

    text: str
    first: bool = True
    last: bool = True
    glued: bool = False


@dataclass(frozen=True)
class Cutting:
    """How long documents are cut for a tokenizer; ``blank``: it puts a blank before every text by itself."""

    limit: int = FRAGMENT
    blank: bool = True


def find_files(pattern: str, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files that a path, a folder or a glob pattern names, sorted by name, none of them empty.

    Args:
        pattern: a folder stands for its files with one of ``suffixes`` (any, if there are none), at any depth.
        suffixes: with the dot; a file may also have .gz behind its own.

    Raises:
        UserError: nothing is there, or a file is empty.
    """
    path = Path(pattern)
    if path.is_dir():
        children = [child for child in path.rglob("*") if child.is_file()]
        found = [child for child in children if not suffixes or suffix_of(child) in suffixes]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
    if not found:
        kinds = f" with {' or '.join(suffixes)} files" if suffixes else ""
        raise UserError(f"no input file at {pattern}: give a file, a folder{kinds} or a glob pattern in quotes")
    empty = sorted(str(file) for file in found if not file.stat().st_size)
    if empty:
        raise UserError(f"{', '.join(empty[:5])} is empty: take it out, or give the file that was meant")
    return sorted(found)


def read_chunks(path: Path, progress: Progress | None = None) -> Iterator[str]:
    """The file's text in parts, line ends as ``\\n``. UTF-8, else a ``UserError`` names the line."""
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    for part in decoded(path, progress):
        yield lines.decode(part)
    yield lines.decode("", final=True)


def read_text(path: Path, document: str, cutting: Cutting, progress: Progress | None = None) -> Iterator[Fragment]:
    """Plain text; ``document`` is a word of ``SEPARATORS`` and says what one document is. Blank ones are left out."""
    return _split(read_chunks(path, progress), SEPARATORS[document], cutting, lambda text: not text.strip())


def read_wiki(path: Path, cutting: Cutting, progress: Progress | None = None) -> Iterator[Fragment]:
    """WikiText's token format, cleaned; each paragraph that is no title is a document, as in MindFormers."""
    cleaned = clean_stream(read_chunks(path, progress), count_closers(path))
    return _split(cleaned, "\n\n", cutting, is_heading)


def read_jsonl(path: Path, field: str, cutting: Cutting, progress: Progress | None = None) -> Iterator[Fragment]:
    """JSON lines (or a JSON list); the string under ``field`` of each record is a document. Errors name the line."""
    for record in read_records(path, progress):
        text = record.text(field, "name the field that holds the text (--field)")
        if text:
            yield from cut(text, cutting)


def write_jsonl(path: Path, documents: list[str]) -> None:
    """Write one ``{"text": ...}`` a line, beside ``path`` first and then renamed into place."""
    with fresh_file(path, overwrite=True) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def cut(text: str, cutting: Cutting, first: bool = True, last: bool = True, glued: bool = False) -> Iterator[Fragment]:
    """``text`` in fragments of at most ``cutting.limit`` characters."""
    start = 0
    while len(text) - start > cutting.limit:
        end, following, glued_next = cut_place(text, start, start + cutting.limit, cutting.blank)
        yield Fragment(text[start:end], first, False, glued)
        start, first, glued = following, False, glued_next
    yield Fragment(text[start:], first, last, glued)


def cut_place(text: str, start: int, limit: int, blank: bool) -> tuple[int, int, bool]:
    """(end of this part, start of the next one, whether the next one is glued) for a cut before ``limit``."""
    at = text.rfind(" ", start + 1, limit)
    while at > start:
        if text[at - 1].isalnum() and text[at + 1].isalnum():
            return at, at + blank, False
        at = text.rfind(" ", start + 1, at)
    at = text.rfind("\n", start + 1, limit) + 1 or limit
    mark = text.rfind("<", max(start + 1, at - LONGEST_MARK), at)
    at = mark if mark > start else at
    return at, at, blank


def _split(
    chunks: Iterator[str], separator: str | None, cutting: Cutting, unwanted: Callable[[str], bool]
) -> Iterator[Fragment]:
    """Documents between separators, in fragments; ``unwanted`` judges a document by its text or its beginning."""
    pending, first, glued, wanted = "", True, False, True
    for chunk in chunks:
        pending += chunk
        *whole, pending = pending.split(separator) if separator else [pending]
        for text in whole:
            if (not first and wanted) or (first and not unwanted(text)):
                yield from cut(text, cutting, first, True, glued)
            first, glued = True, False
        if len(pending) > PENDING and pending.strip():
            wanted = wanted if not first else not unwanted(pending)
            end, following, glued_next = cut_place(pending, 0, len(pending.rstrip("\n")) - 1, cutting.blank)
            if wanted:
                yield from cut(pending[:end], cutting, first, False, glued)
            pending, first, glued = pending[following:], False, glued_next
    if (not first and wanted) or (first and pending and not unwanted(pending)):
        yield from cut(pending, cutting, first, True, glued)
