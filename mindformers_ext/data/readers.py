# SPDX-License-Identifier: Apache-2.0
"""Readers: files in, documents (plain strings) out, one at a time."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mindformers_ext.core.errors import UserError


def read_text(path: Path) -> Iterator[str]:
    """The whole file as one document. UTF-8, else a ``UserError``."""
    yield _decoded(path)


def read_jsonl(path: Path) -> Iterator[str]:
    """One JSON object a line; its ``text`` is the document. Errors name the line; blank lines are skipped."""
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); write one object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'{path}, line {number}: no string under "text"; write {{"text": "..."}}')
        yield record["text"]


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": read_text, ".jsonl": read_jsonl}


def find_files(pattern: str) -> list[Path]:
    """The readable files that a path, a folder or a glob pattern names, sorted by name.

    Raises:
        UserError: nothing is there, or a file has a suffix that no reader knows.
    """
    path = Path(pattern)
    if path.is_dir():
        found = [child for child in path.rglob("*") if child.suffix in READERS and child.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
    if not found:
        raise UserError(f"no text file at {pattern}: give a file, a folder or a glob of {_suffixes()} files")
    strangers = sorted(str(file) for file in found if file.suffix not in READERS)
    if strangers:
        raise UserError(f"no reader for {', '.join(strangers[:5])}: known are {_suffixes()}")
    return sorted(found)


def read_documents(pattern: str) -> Iterator[str]:
    """All documents of all files that ``pattern`` names (see ``find_files``), in file order."""
    for path in find_files(pattern):
        yield from READERS[path.suffix](path)


def write_jsonl(path: Path, documents: list[str]) -> None:
    """Write one ``{"text": ...}`` a line, beside ``path`` first and then renamed into place."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    beside.replace(path)


def _suffixes() -> str:
    return " and ".join(READERS)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert it, for example with iconv") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
