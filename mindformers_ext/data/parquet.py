# SPDX-License-Identifier: Apache-2.0
"""Parquet files of articles, as Wikipedia is published; ``pyarrow`` is imported when one is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.readers import Cutting, Fragment, Progress, cut
from mindformers_ext.data.text_lines import lines_of

ROWS = 256  # articles in memory at once


def read_parquet(
    path: Path, field: str | None, cutting: Cutting, progress: Progress | None = None
) -> Iterator[Fragment]:
    """The lines of the articles, blank ones left out, each a document. ``field`` None is the first column.

    Raises:
        UserError: pyarrow is not installed, the file is of another kind, or the column is missing or holds no text.
    """
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        name = field or (names[0] if names else "")
        if name not in names:
            have = ", ".join(names) or "none"
            raise UserError(f"{path} has the columns {have}, no '{name}': give another --field")
        done = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
            yield from _lines(path, name, batch.column(0).to_pylist(), done, cutting)
            done += batch.num_rows
            if progress:
                progress(path.stat().st_size * batch.num_rows // max(file.metadata.num_rows, 1))


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """``pyarrow.parquet.ParquetFile`` of ``path``; what it raises inside the block is a ``UserError`` too."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("parquet files are read by pyarrow, which is not installed: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds text that is not UTF-8 ({error.reason}): write it again") from error
    except (pyarrow.ArrowException, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no parquet file, or a damaged one ({what}): give one, or copy it again") from error


def _lines(path: Path, name: str, articles: list[object], done: int, cutting: Cutting) -> Iterator[Fragment]:
    for number, text in enumerate(articles, start=done + 1):
        if not isinstance(text, str):
            raise UserError(f"{path}, row {number}: '{name}' holds {text!r:.40}, not text; give another --field")
        for line in lines_of(text):
            if stripped := line.strip():
                yield from cut(stripped, cutting)
