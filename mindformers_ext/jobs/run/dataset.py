# SPDX-License-Identifier: Apache-2.0
"""The data set of a run: is it there, do its rows fit the sequence length, do its ids fit the embedding."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np

from mindformers_ext.core.config.run import DATA_OF, MINDRECORD, PYTORCH, DataSpec, RunSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.engine.door import open_records

SAMPLE_ROWS = 2000  # rows per file whose ids are read
SAMPLE_FILES = 4
_MINDRECORD = re.compile(r"mindrecord\d*$")


def check_dataset(run: RunSpec, spec: NetworkSpec) -> None:
    """Check the MindRecord files that ``run`` reads against the network.

    Training rows hold seq_length + 1 tokens (the network predicts the next one), evaluation rows seq_length or
    seq_length + 1. The ids of the first 2000 rows of up to four files are read.

    Raises:
        UserError: no file, too few rows, a missing column, another row length, or an id without an embedding.
    """
    data = run.data
    if data is None:
        raise UserError(f"run_mode {run.mode} needs the section {DATA_OF[run.mode]}: add it to the file")
    if data.loader != MINDRECORD:
        return
    files = dataset_files(data)
    rows = sum(row_count(path) for path in files)
    _check_count(run, data, rows if data.limit is None else min(rows, data.limit))
    for path in files[:SAMPLE_FILES]:
        _check_rows(path, data.columns, spec, run)


def dataset_files(data: DataSpec) -> list[Path]:
    """The files that MindFormers would read.

    Raises:
        UserError: none is named, or a named one does not exist.
    """
    section = data.section
    option = f"--{'train' if section.startswith('train') else 'eval'}_data"
    if not data.named:
        raise UserError(f"{section}.data_loader names no data: give {option} FILE")
    files = []
    for path in data.named:
        if not path.exists():
            raise UserError(
                f"the data set {path} ({section}.data_loader.dataset_dir) does not exist: give {option} FILE, or make "
                "it first (tools/dataset_preprocess/llama/llama_preprocess.py)"
            )
        found = sorted(item for item in path.rglob("*") if _MINDRECORD.search(item.name)) if path.is_dir() else [path]
        if not found or not all(_MINDRECORD.search(item.name) for item in found):
            raise UserError(f"{path} is not MindRecord: its name must end in .mindrecord, or be a folder of such files")
        files += found
    for path in files:
        if not path.with_name(path.name + ".db").is_file():
            raise UserError(f"the index {path.name}.db of {path} is missing: copy both files, or write the data again")
    return files


def row_count(path: Path) -> int:
    """Rows of one MindRecord file, from its index."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}.db?mode=ro", uri=True)) as index:
            return int(index.execute("select count(*) from INDEXES").fetchone()[0])
    except sqlite3.Error as error:
        raise UserError(f"the index {path.name}.db of {path} cannot be read ({error}): write the data again") from error


def _check_count(run: RunSpec, data: DataSpec, rows: int) -> None:
    if run.mode == "eval":
        batch = run.batch_size if data.drop_remainder else 1
    else:
        batch = run.batch_size * run.accumulation
    if rows < batch:
        raise UserError(
            f"{data.section} holds {rows} rows, one step takes {batch} (batch_size x "
            "gradient_accumulation_steps): give more data or a smaller batch_size"
        )


def _check_rows(path: Path, columns: tuple[str, ...], spec: NetworkSpec, run: RunSpec) -> None:
    seq, vocab = spec.seq_length, spec.model.vocab_size
    evaluates = run.mode == "eval"
    allowed = (seq, seq + 1) if evaluates else (seq + 1,)
    problems = Problems(f"data set {path}")
    try:
        sample = list(islice(open_records(plain=run.engine == PYTORCH).read(path, columns), SAMPLE_ROWS))
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"data set {path} cannot be read with the columns {', '.join(columns)}: {line}") from error
    lengths = sorted({len(row[columns[0]]) for row in sample})
    if any(length not in allowed for length in lengths):
        wanted = f"{seq} or {seq + 1}" if evaluates else f"{seq + 1} (seq_length + 1)"
        problems.add(
            f"rows of {', '.join(map(str, lengths))} tokens, model_config.seq_length={seq} needs {wanted}",
            f"set model.model_config.seq_length to {lengths[-1] - 1}, or write the data for {seq}",
        )
    largest = max(int(np.max(row[columns[0]])) for row in sample)
    smallest = min(int(np.min(row[columns[0]])) for row in sample)
    if largest >= vocab or smallest < 0:
        problems.add(
            f"ids from {smallest} to {largest}, model_config.vocab_size={vocab} has embeddings for 0 to {vocab - 1}",
            f"set vocab_size to {largest + 1} or more (the tokenizer's size)",
        )
    if "labels" in columns:
        labels = np.unique(np.concatenate([row["labels"] for row in sample]))
        wrong = labels[(labels >= vocab) | ((labels < 0) & (labels != spec.model.ignore_token_id))]
        if wrong.size:
            problems.add(
                f"labels such as {wrong[0]}", f"use ids below {vocab} or ignore_token_id {spec.model.ignore_token_id}"
            )
    problems.raise_if_any()
