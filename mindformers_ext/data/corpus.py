# SPDX-License-Identifier: Apache-2.0
"""A text corpus that every machine with Python has: the documentation inside its standard library."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"})
SHORTEST = 40  # characters; shorter docstrings are mostly "Return the name."


def library_files() -> list[Path]:
    """The standard library's source files in an order that looks random and is the same on every run.

    Sorted by the hash of the relative path, so that a size limit takes from all over the library, not from its A's.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    return sorted(paths, key=lambda path: sha256(path.relative_to(root).as_posix().encode()).digest())


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in source order; a file that does not parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST:
            yield text


def help_topics() -> Iterator[str]:
    """The language reference's chapters behind ``help('topics')``; none where a distribution leaves them out."""
    if importlib.util.find_spec("pydoc_data") is None:
        return
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()


def standard_library_text(limit_bytes: int) -> Iterator[str]:
    """Documents of real English prose about Python: help topics, then docstrings, until ``limit_bytes`` of UTF-8.

    Repeated texts are given once. The last document may pass the limit, so no document is cut.
    """
    seen: set[bytes] = set()
    size = 0
    for text in _all_documents():
        if size >= limit_bytes:
            return
        encoded = text.encode("utf-8", errors="ignore")
        digest = sha256(encoded).digest()
        if digest not in seen:
            seen.add(digest)
            size += len(encoded)
            yield encoded.decode("utf-8")


def split_held_out(documents: list[str], every: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: each ``every``-th one is held out, so both come from all over the corpus."""
    held_out = documents[every - 1 :: every]
    return [text for index, text in enumerate(documents) if (index + 1) % every], held_out


def _all_documents() -> Iterator[str]:
    yield from help_topics()
    for path in library_files():
        yield from docstrings(path)
