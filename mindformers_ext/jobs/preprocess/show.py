# SPDX-License-Identifier: Apache-2.0
"""Records of a MindRecord file, each as text with the loss-bearing part known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.show import ShownRecord as ShownRecord  # part of what this module gives
from mindformers_ext.data.show import show
from mindformers_ext.data.tokenizers import Tokenizer, open_tokenizer
from mindformers_ext.formats.mindrecord_file import record_fields, row_count
from mindformers_ext.jobs.engine.door import open_records

FIELDS = ("input_ids", "labels")  # what a causal model reads
PADS = ("pad_id", "unk_id", "eos_id")  # the first that a tokenizer has pads its rows (see preprocess_request.py)


@dataclass(frozen=True, kw_only=True)
class ShowRequest:
    """Which records to show. ``pad_id`` None: the one that llama_preprocess.py takes for this tokenizer."""

    path: Path
    model_file: Path
    count: int = 3
    skip: int = 0
    pad_id: int | None = None
    ignore_id: int = -100

    def check(self) -> None:
        """Every number is sensible, or a ``UserError``."""
        if self.count < 1:
            raise UserError(f"--n {self.count}: give 1 or more")
        if self.skip < 0:
            raise UserError(f"--skip {self.skip}: give 0 or more")


@dataclass(frozen=True)
class OpenedFile:
    """A file that can be shown: its number of records, its fields, the pad id, and the records asked for.

    ``records`` yields (number from 1, record) and may raise a ``UserError``.
    """

    rows: int
    fields: tuple[str, ...]
    pad_id: int
    records: Iterator[tuple[int, ShownRecord]]


def open_file(request: ShowRequest) -> OpenedFile:
    """Check the file and the tokenizer, before MindSpore is imported.

    Raises:
        UserError: not a MindRecord of token rows, no tokenizer, or fewer records than are skipped.
    """
    request.check()
    described = record_fields(request.path)
    fields = tuple(name for name in FIELDS if name in described)
    if "input_ids" not in fields:
        raise UserError(
            f"{request.path} has the fields {', '.join(described)}, no input_ids: give a file of token rows"
        )
    rows = row_count(request.path)
    if request.skip >= rows:
        raise UserError(f"--skip {request.skip}: {request.path} holds {rows} records")
    tokenizer = open_tokenizer(request.model_file)
    special = tokenizer.special_ids
    pad_id = request.pad_id
    if pad_id is None:
        pad_id = next((special[name] for name in PADS if special[name] >= 0), -1)
    return OpenedFile(rows, fields, pad_id, _records(request, fields, tokenizer, pad_id))


def _records(
    request: ShowRequest, fields: tuple[str, ...], tokenizer: Tokenizer, pad_id: int
) -> Iterator[tuple[int, ShownRecord]]:
    rows = open_records().read(request.path, fields)
    chosen = islice(enumerate(rows, start=1), request.skip, request.skip + request.count)
    try:
        for number, row in chosen:
            ids, labels = (row[name].tolist() if name in row else None for name in FIELDS)
            try:
                yield number, show(ids or [], labels, tokenizer, pad_id, request.ignore_id)
            except UserError as error:
                raise UserError(f"{request.path}, record {number}: {error}") from error
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{request.path} cannot be read: {line}") from error
