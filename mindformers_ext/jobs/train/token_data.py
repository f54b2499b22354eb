# SPDX-License-Identifier: Apache-2.0
"""The rows of a training or evaluation run, batch by batch, from MindRecord files and without MindSpore."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindformers_ext.core.config.mixture_words import MIXTURE
from mindformers_ext.core.config.run import PYTORCH, DataSpec, data_spec_from_yaml
from mindformers_ext.core.config.train import OWN_LOOPS
from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.preferences import PAIR_COLUMNS
from mindformers_ext.data.row_order import RowOrder
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.jobs.run.dataset import check_documents, check_ids, dataset_files

COLUMNS = (("input_ids",), ("input_ids", "labels"), ("input_ids", "labels", DOCUMENT_IDS), PAIR_COLUMNS)
LOADERS = (None, "MindDataset", MIXTURE)
SHUFFLES = (None, True, False, "global")


class BatchSource(Protocol):
    """Where a run's rows come from; ``rows`` of a step of all processes, ``per_epoch`` steps of one pass."""

    rows: int
    per_epoch: int

    def batch(self, step: int, part: slice) -> tuple[np.ndarray, ...]:
        """Columns (rows, width) int32 of step ``step`` (from 0) of the run; ``part`` chooses among its rows."""
        ...

    def state(self) -> Mapping[str, np.ndarray]:
        """What a checkpoint must hold of it, by name."""
        ...

    def restore(self, state: Mapping[str, np.ndarray], step: int, where: str) -> None:
        """Continue behind ``step`` from such a state, of the checkpoint ``where``."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class PlainSource:
    """A batch source whose rows follow from the step's number alone: nothing of it stands in a checkpoint."""

    def state(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray], step: int, where: str) -> None:
        """Nothing."""


class RecordRows:
    """Rows of several MindRecord files, one after the other, by number. ``columns`` are read of each.

    vocab: ids of a row must be below; None: they are not looked at.
    """

    def __init__(self, paths: Sequence[Path], columns: tuple[str, ...], vocab: int | None = None) -> None:
        self.columns, self.vocab = columns, vocab
        self.files = [MindRecordFile(path) for path in paths]
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        """Rows of all files."""
        return self._ends[-1] if self._ends else 0

    def row(self, number: int) -> tuple[np.ndarray, ...]:
        """Columns (width) int32 of one row."""
        file, place = self.place(number)
        return file.read(place, self.columns)

    def place(self, row: int) -> tuple[MindRecordFile, int]:
        """The file that holds a row, and its number there."""
        file = bisect_right(self._ends, row)
        return self.files[file], row - (self._ends[file - 1] if file else 0)

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()


Place = tuple[RecordRows, int]  # rows, and the number of one


def stacked(places: Sequence[Place]) -> tuple[np.ndarray, ...]:
    """Columns (rows, width) int32 of rows that may be of different files.

    Raises:
        UserError: rows of different lengths, or ids without an embedding: only the first rows were looked at before the
            run (``jobs.run.dataset``).
    """
    found = [rows.row(number) for rows, number in places]
    first, vocab = places[0][0], places[0][0].vocab
    if len({len(row[0]) for row in found}) > 1:
        raise UserError(f"{first.files[0].path}: rows of different lengths: write the data again, packed")
    columns = tuple(np.stack([row[i] for row in found]) for i in range(len(first.columns)))
    if DOCUMENT_IDS in first.columns:
        check_documents(columns[first.columns.index(DOCUMENT_IDS)], str(first.files[0].path))
    tokens = [column for name, column in zip(first.columns, columns, strict=True) if name != DOCUMENT_IDS]
    if vocab is None or (columns[0].min() >= 0 and max(column.max() for column in tokens) < vocab):
        return columns
    for place, (rows, number) in enumerate(places):
        file, row = rows.place(number)
        check_ids([column[place] for column in tokens], vocab, f"{file.path}, row {row}")
    return columns


class TokenData(PlainSource):
    """Batches of token rows in MindSpore's order.

    Args:
        config: the YAML's content.
        section: ``train_dataset`` or ``eval_dataset``.
        rows: rows of one step, of all processes together.
        shards: processes that MindRecord deals the rows out to, one by one: process r has r, r + shards, ... of an
            epoch's order, and the first rows again where they do not come out even.
        engine: whose words an error uses.
        vocab: ids of a row must be below; None: they are not looked at.

    Raises:
        UserError: keys that are not built, no data, too few rows, or rows of another length than ``width``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        section: str,
        rows: int,
        shards: int = 1,
        engine: str = PYTORCH,
        vocab: int | None = None,
    ) -> None:
        words = config.get(section) or {}
        loader = words.get("data_loader") or {}
        check_words(words, loader, section, OWN_LOOPS[engine])
        data = data_spec_from_yaml(config, section) or DataSpec(section=section)
        self.records = RecordRows(dataset_files(data), columns_of(words), vocab)
        held, limit = len(self.records), loader.get("num_samples")
        each = -(-held // shards)
        if isinstance(limit, int) and limit > 0:  # shuffled first, then cut
            each = min(each, limit // shards)
        self.total = min(held, each * shards)
        training = section == "train_dataset"
        shuffles = loader.get("shuffle", training)
        self.order = RowOrder(held, training if shuffles is None else bool(shuffles), data.seed)
        self.rows, self.shards = rows, shards
        self.per_epoch = each // (rows // shards)
        if training and not self.per_epoch:
            raise UserError(
                f"{section} holds {self.total} rows, one step takes {rows}: give more data or a smaller batch_size"
            )

    def batch(self, step: int, part: slice) -> tuple[np.ndarray, ...]:
        """Columns (rows, width) int32 of step ``step`` (from 0) of the run; ``part`` chooses among its rows."""
        return self.read(self.numbers(step, part))

    def numbers(self, step: int, part: slice) -> np.ndarray:
        """The numbers of such rows among those of all files."""
        epoch, place = divmod(step, self.per_epoch)
        numbers = np.arange(place * self.rows, (place + 1) * self.rows) % len(self.records)
        by_process = numbers.reshape(-1, self.shards).T.reshape(-1)
        return self.order.epoch(epoch)[by_process][part]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Columns (rows, width) int32 of the rows with these numbers, of all files one after the other."""
        return stacked([(self.records, int(row)) for row in rows])

    def close(self) -> None:
        """Let go of the files."""
        self.records.close()


def columns_of(words: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that a data set's section asks for."""
    return tuple(words.get("input_columns") or ("input_ids",))


def check_words(words: Mapping[str, Any], loader: Mapping[str, Any], section: str, trainer: str) -> None:
    """What our loop does not build of a data set's section is a ``UserError``; ``trainer``: what it calls itself."""
    problems = Problems(section)
    if loader.get("type") not in LOADERS:
        problems.add(
            f"data_loader.type={loader.get('type')!r}: {trainer} reads MindRecord files",
            "set MindDataset and give the files of llama_preprocess.py",
        )
    if columns_of(words) not in COLUMNS:
        problems.add(
            f"input_columns={words['input_columns']!r}",
            f"give one of {', '.join(str(list(names)) for names in COLUMNS)}",
        )
    if words.get("repeat") not in (None, 1):
        problems.add(f"repeat={words['repeat']!r} is not built in {trainer}", "raise runner_config.epochs")
    if section == "train_dataset" and words.get("drop_remainder", True) is False:
        problems.add(f"drop_remainder=False: every step of {trainer} has the same number of rows", "set it to True")
    if loader.get("shuffle") not in SHUFFLES:
        problems.add(f"data_loader.shuffle={loader['shuffle']!r} is not built in {trainer}", "set True or False")
    for name in ("eod_reset", "dynamic_batch"):
        if words.get(name):
            problems.add(f"{name}={words[name]!r} is not built in {trainer}", "set it to False")
    problems.raise_if_any()
