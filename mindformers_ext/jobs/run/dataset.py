# SPDX-License-Identifier: Apache-2.0
"""The data set of a run: is it there, do its rows fit the sequence length, do its ids fit the embedding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.run import DATA_OF, MINDRECORD, PYTORCH, DataSpec, RunSpec
from mindformers_ext.core.documents import DOCUMENT_IDS, MOST_DOCUMENTS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.preferences import PAIR_COLUMNS, holds_pairs
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.data.conversations import IGNORED
from mindformers_ext.data.documents import wrong_documents
from mindformers_ext.formats.mindrecord_file import row_count
from mindformers_ext.jobs.engine.door import open_records

SAMPLE_ROWS = 20_000  # rows whose ids are read before the run, a second or two; the rest as they come
BLOCK_ROWS = 256
_MINDRECORD = re.compile(r"mindrecord\d*$")


def check_dataset(run: RunSpec, spec: NetworkSpec) -> None:
    """Check the MindRecord files that ``run`` reads against the network.

    Training rows hold seq_length + 1 tokens (the network predicts the next one), evaluation rows seq_length or
    seq_length + 1. The ids of the first 20000 rows are read.

    Raises:
        UserError: no file, too few rows, a missing column, another row length, an id without an embedding (the row is
            named), or rows of which none bears loss.
    """
    data = run.data
    if data is None:
        raise UserError(f"run_mode {run.mode} needs the section {DATA_OF[run.mode]}: add it to the file")
    if data.loader != MINDRECORD:
        return
    if run.mode == "eval" and DOCUMENT_IDS in data.columns:
        raise UserError(
            f"{data.section}.input_columns names {DOCUMENT_IDS}: evaluation takes rows of one document each; write "
            "them with --pack_strategy pad, and leave the column out"
        )
    files = dataset_files(data)
    rows = sum(row_count(path) for path in files)
    _check_count(run, data, rows if data.limit is None else min(rows, data.limit))
    check_rows(files, data, spec, run)


def check_rows(
    files: Sequence[Path], data: DataSpec, spec: NetworkSpec, run: RunSpec, most: int = SAMPLE_ROWS, what: str = ""
) -> None:
    """Look at the first ``most`` rows of ``files``, which ``what`` names; errors as ``check_dataset`` has them."""
    left, bearing = most, 0
    for path in files:
        if left > 0:
            read, found = _check_file(path, data, spec, run, left)
            left, bearing = left - read, bearing + found
    if not bearing:
        raise UserError(
            f"{what or data.section}: no position of {most - left} rows bears loss: all tokens are padding "
            f"(pad_token_id {spec.model.pad_token_id}), or all labels are {spec.model.ignore_token_id}: write the data "
            "again, with the tokenizer and the template that the model was made for"
        )


def dataset_files(data: DataSpec) -> list[Path]:
    """The files that MindFormers would read.

    Raises:
        UserError: none is named, or a named one does not exist.
    """
    section = data.section
    option = f"--{'train' if section.startswith('train') else 'eval'}_data"
    if not data.named:
        raise UserError(f"{section}.data_loader names no data: give {option} FILE")
    return record_files(data.named, f"{section}.data_loader.dataset_dir", f"give {option} FILE, or ")


def record_files(named: Sequence[Path], where: str, advice: str = "") -> list[Path]:
    """The MindRecord files of paths that the key ``where`` names; folders give all that are below them.

    Raises:
        UserError: one does not exist, is something else, or lacks its index.
    """
    files = []
    for path in named:
        if not path.exists():
            raise UserError(
                f"the data set {path} ({where}) does not exist: {advice}make "
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


def _check_file(path: Path, data: DataSpec, spec: NetworkSpec, run: RunSpec, most: int) -> tuple[int, int]:
    """Look at up to ``most`` rows of one file; returns how many were read, and how many positions bear loss."""
    read = bearing = 0
    problems = Problems(f"data set {path}")
    try:
        rows = islice(open_records(plain=run.engine == PYTORCH).read(path, data.columns), most)
        for first, block in _blocks(rows, data.columns):
            _check_lengths({len(row) for row in block[0]}, spec, run.mode == "eval", problems)
            problems.raise_if_any()
            columns = dict(zip(data.columns, map(_stacked, block), strict=True))
            for ids_name, labels_name in sides(data.columns):
                ids, labels = columns[ids_name], columns.get(labels_name)
                _check_block(ids, labels, first, spec, problems)
                _check_documents(ids, columns.get(DOCUMENT_IDS), first, problems)
                problems.raise_if_any()
                bearing += loss_tokens(ids, labels, spec.model.pad_token_id, spec.model.ignore_token_id)
            read += len(block[0])
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"data set {path} cannot be read with the columns {', '.join(data.columns)}: {line}") from error
    return read, bearing


def _blocks(
    rows: Iterator[Mapping[str, np.ndarray]], columns: tuple[str, ...]
) -> Iterator[tuple[int, list[list[np.ndarray]]]]:
    """The rows in blocks: the number of the first one, and its columns."""
    first = 0
    while block := list(islice(rows, BLOCK_ROWS)):
        yield first, [[row[name] for row in block] for name in columns]
        first += len(block)


def _check_lengths(lengths: set[int], spec: NetworkSpec, evaluates: bool, problems: Problems) -> None:
    seq = spec.seq_length
    if lengths <= ({seq, seq + 1} if evaluates else {seq + 1}) and len(lengths) == 1:
        return
    wanted = f"{seq} or {seq + 1}" if evaluates else f"{seq + 1} (seq_length + 1)"
    problems.add(
        f"rows of {', '.join(map(str, sorted(lengths)))} tokens, model_config.seq_length={seq} needs {wanted}",
        f"set model.model_config.seq_length to {max(lengths) - 1}, or write the data for {seq}",
    )


def _check_block(ids: np.ndarray, labels: np.ndarray | None, first: int, spec: NetworkSpec, problems: Problems) -> None:
    """Ids (rows, length) must have an embedding, labels be ids or the one that bears no loss."""
    vocab, ignored = spec.model.vocab_size, spec.model.ignore_token_id
    wrong = (ids >= vocab) | (ids < 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        problems.add(
            f"row {first + row} holds the id {ids[row][wrong[row]][0]} (around it from {ids.min()} to {ids.max()}), "
            f"model_config.vocab_size={vocab} has embeddings for 0 to {vocab - 1}",
            "set vocab_size to the tokenizer's size, or write the data with the model's tokenizer",
        )
    if labels is None:
        return
    wrong = (labels >= vocab) | ((labels < 0) & (labels != ignored))
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        problems.add(
            f"row {first + row} holds the label {labels[row][wrong[row]][0]}",
            f"use ids below {vocab} or ignore_token_id {ignored}",
        )


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """(rows, length); of rows of different lengths as long as the longest, -1 behind the others."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def _check_documents(ids: np.ndarray, documents: np.ndarray | None, first: int, problems: Problems) -> None:
    """Every row numbers its documents (``core.documents``)."""
    if documents is None:
        return
    wrong = 0 if documents.shape != ids.shape else wrong_documents(documents)
    if wrong is not None:
        problems.add(
            f"row {first + wrong}: {DOCUMENT_IDS} must be 1, 2, ... up to {MOST_DOCUMENTS} in order, one for every "
            "token, and 0 at its padding",
            "write the data again with --pack_strategy",
        )


def sides(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of ids and labels that belong together among a data set's columns."""
    if holds_pairs(names):
        return [PAIR_COLUMNS[:2], PAIR_COLUMNS[2:]]
    return [(names[0], "labels")]


def check_documents(documents: np.ndarray, where: str) -> None:
    """The documents (rows, length) of a step's rows; a ``UserError`` names ``where``."""
    if wrong_documents(documents) is not None:
        raise UserError(f"{where}: {DOCUMENT_IDS} that are not numbered in order: write the data again")


def check_ids(columns: Sequence[np.ndarray], vocab: int, where: str) -> None:
    """Ids (first column, any shape) and labels must be below ``vocab``, ids not below 0; a ``UserError`` names
    ``where``."""
    lowest, highest = int(columns[0].min()), max(int(column.max()) for column in columns)
    if lowest < 0 or highest >= vocab:
        raise UserError(
            f"{where}: ids without an embedding (from {lowest} to {highest}, vocab_size is {vocab}): set vocab_size to "
            "the tokenizer's size, or write the data with the model's tokenizer"
        )


def loss_tokens(ids: np.ndarray, labels: np.ndarray | None, pad_id: int, ignored: int = IGNORED) -> int:
    """Positions of rows (rows, length) that bear loss: MindFormers' LlamaForCausalLM, the next token is the target."""
    weight = ids[:, :-1] != pad_id
    if labels is not None:
        weight &= labels[:, 1:] != ignored
    return int(weight.sum())


def rows_of_step(run: RunSpec, spec: NetworkSpec) -> tuple[int, int]:
    """Rows of one step of our loop, of all processes together, and how many of these there are."""
    processes = 1 if spec.parallel.parallel_mode == "stand_alone" else spec.parallel.device_num
    return spec.batch_size * run.accumulation * processes, processes
