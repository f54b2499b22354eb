# SPDX-License-Identifier: Apache-2.0
"""Text to MindRecord: reader -> tokenizer (in processes) -> rows -> writer (a process of its own)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.errors import UserError
from mindformers_ext.data.conversations import IGNORED
from mindformers_ext.data.packing import Packer, check_ids
from mindformers_ext.data.readers import Progress
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.formats.atomic import fresh_file, fresh_group, recover_group
from mindformers_ext.jobs.engine.door import open_record_writer
from mindformers_ext.jobs.engine.protocols import RecordWriter
from mindformers_ext.jobs.preprocess.batches import EncodedText
from mindformers_ext.jobs.preprocess.document_rows import DocumentRows
from mindformers_ext.jobs.preprocess.encode import Tokens
from mindformers_ext.jobs.preprocess.request import SAMPLES, Checked, PreprocessRequest, check_request
from mindformers_ext.jobs.preprocess.shards import ShardReport, find_shards, write_shard
from mindformers_ext.jobs.run.dataset import loss_tokens

BLOCK_TOKENS = 1 << 18  # handed to the writer at once
SPOOLED = "tokens.int32"  # ids of the first pass, where --repeat asks for more


@dataclass(frozen=True)
class Summary:
    """What was written; also the file ``<output>.summary.json``. The same for any number of workers.

    ``loss_tokens`` counts what a network learns to predict: not masked by labels, and not behind a token that is
    ``pad_token_id``. ``no_question`` conversations hold no human turn and are left out; ``masked`` rows hold no answer,
    or only one that was cut off; ``truncated`` rows lost ``truncated_tokens`` at their end. Of whole documents
    ``too_long`` ones with ``too_long_tokens`` are left out.
    """

    dataset_type: str
    split: str
    input_files: list[str]
    output_files: list[str]
    tokenizer: str
    tokenizer_sha256: str
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    seq_length: int
    row_length: int
    repeat: int
    documents: int = 0
    records: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    padding_tokens: int = 0
    dropped_tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    masked: int = 0
    masked_skipped: int = 0
    no_question: int = 0
    too_long: int = 0
    too_long_tokens: int = 0
    samples_left_out: bool = False

    @property
    def padding_share(self) -> float:
        """Padding among all tokens of the rows."""
        return self.padding_tokens / self._held

    @property
    def loss_share(self) -> float:
        """Tokens with loss among all tokens of the rows."""
        return self.loss_tokens / self._held

    @property
    def _held(self) -> int:
        """Tokens of all rows; a pair has two."""
        return max(self.records * self.row_length, 1) * (2 if self.dataset_type == "dpo" else 1)

    def as_json(self) -> str:
        """Everything as JSON text."""
        shares = {"padding_share": round(self.padding_share, 6), "loss_share": round(self.loss_share, 6)}
        return json.dumps({**asdict(self), **shares}, indent=2, ensure_ascii=False) + "\n"


def encode_shard(request: PreprocessRequest) -> ShardReport:
    """Encode the part of the input that ``--shard i/n`` names, and leave it beside the output for the join.

    Raises:
        UserError: as for ``preprocess``.
    """
    checked, tokenizer = check_request(request)
    counts = {"no_question": 0}
    source = EncodedText(checked, tokenizer, counts)
    with _bar(checked) as bar, closing(source.encoded(bar.update)) as encoded:
        return write_shard(request, source.made_of, encoded, counts)


def preprocess(request: PreprocessRequest) -> Summary:
    """Write the data set and its summary; they appear whole or not at all. ``--shard join`` takes what shards encoded.

    Raises:
        UserError: an option, an input line, a tokenizer or an output that does not fit; what and where is said.
    """
    recover_group(request.output_file)
    checked, tokenizer = check_request(request)
    with fresh_group(request.output_file, request.overwrite) as folder:
        writer = open_record_writer(
            folder / request.output_file.name, request.fields, request.file_partition, checked.row_length
        )
        try:
            run = _Run(checked, tokenizer, folder, writer)
            run.work()
            if not writer.close():
                raise UserError(
                    f"{request.input_glob} fills not one row of {checked.row_length} tokens: give more text, or a "
                    "smaller --seq_length"
                )
        except BaseException:
            writer.abort()
            raise
        summary = run.summary()
        if request.summary is None:
            (folder / request.summary_file.name).write_text(summary.as_json(), encoding="utf-8")
    if request.summary is not None:
        with fresh_file(request.summary, request.overwrite) as path:
            path.write_text(summary.as_json(), encoding="utf-8")
    if request.is_join:
        for path in find_shards(request, run.source.made_of):
            path.unlink()
    return summary


def _bar(checked: Checked) -> tqdm:
    size = sum(path.stat().st_size for path in checked.files)
    return tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=0.5, dynamic_ncols=True)


class _Run:
    """One run: takes batches from the readers, gives blocks of rows to the writer, and counts."""

    def __init__(self, checked: Checked, tokenizer: Tokenizer, folder: Path, writer: RecordWriter) -> None:
        self.checked, self.request, self.tokenizer = checked, checked.request, tokenizer
        self.folder, self.writer = folder, writer
        self.counts = dict.fromkeys(
            (
                "documents",
                "tokens",
                "unknown_tokens",
                "padding_tokens",
                "dropped_tokens",
                "loss_tokens",
                "truncated",
                "truncated_tokens",
                "masked",
                "masked_skipped",
                "no_question",
                "too_long",
                "too_long_tokens",
                "records",
            ),
            0,
        )
        self.block: list[dict[str, np.ndarray]] = []
        self.block_tokens = 0
        self.source = EncodedText(checked, tokenizer, self.counts)
        self.framed_rows = self.source.framed_rows
        self.documents = DocumentRows(checked, self.counts)
        self.packer = Packer(checked.row_length - 2 * self.framed_rows)
        self.samples_left = (self.request.samples_num or SAMPLES) if self.framed_rows else None

    def work(self) -> None:
        """Everything from the first byte read to the last row handed over."""
        with _bar(self.checked) as bar:
            self._first_pass(bar.update)
        for _ in range((self.request.repeat or 1) - 1):
            for ids in _blocks_of(self.folder / SPOOLED):
                self._pack(ids)
        for row in self.documents.close():
            self._row(row)
        self._flush()
        self.counts["dropped_tokens"] += len(self.packer.rest)
        (self.folder / SPOOLED).unlink(missing_ok=True)

    def summary(self) -> Summary:
        """What was counted."""
        request, checked = self.request, self.checked
        return Summary(
            request.dataset_type,
            request.split,
            [str(path) for path in checked.files],
            [str(path) for path in request.shard_files()],
            str(self.tokenizer.path),
            self.source.tokenizer_sha256,
            checked.special.bos,
            checked.special.eos,
            checked.special.pad,
            checked.unknown,
            checked.seq_length,
            checked.row_length,
            request.repeat or 1,
            **self.counts,
            samples_left_out=self.samples_left == 0,
        )

    def _first_pass(self, progress: Progress) -> None:
        encoded = self.source.encoded(progress)
        spool = (self.folder / SPOOLED).open("wb") if (self.request.repeat or 1) > 1 else None
        try:
            for tokens in encoded:
                self._count(tokens)
                if tokens.lengths is not None:
                    for row in self.documents.add(tokens):
                        self._row(row)
                    continue
                if tokens.labels is not None:
                    self._conversations(tokens)
                    continue
                self._pack(tokens.ids)
                if spool:
                    tokens.ids.tofile(spool)
                if self.samples_left == 0:
                    break
        finally:
            encoded.close()  # its processes end now
            if spool:
                spool.close()

    def _count(self, tokens: Tokens) -> None:
        counts = self.counts
        counts["documents"] += tokens.documents
        counts["tokens"] += tokens.ids.size - tokens.padding + tokens.cut
        counts["truncated"] += tokens.truncated
        counts["truncated_tokens"] += tokens.cut
        if tokens.ids.size:
            check_ids([int(tokens.ids.min()), int(tokens.ids.max())], self.checked.vocab_size, "the data")

    def _conversations(self, tokens: Tokens) -> None:
        ids, labels = tokens.ids, tokens.labels
        assert labels is not None
        if self.request.skip_masked:
            keep = (labels != IGNORED).any(axis=1)
            self.counts["masked_skipped"] += int((~keep).sum())
            ids, labels = ids[keep], labels[keep]
        else:
            self.counts["masked"] += tokens.masked
        self._rows(ids, labels)

    def _pack(self, ids: np.ndarray) -> None:
        rows = self.packer.add(ids)
        if self.framed_rows:
            special = self.checked.special
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (special.bos, special.eos)))
        if self.samples_left is not None:
            rows = rows[: self.samples_left]
            self.samples_left -= len(rows)
        self._rows(rows, None)

    def _row(self, row: dict[str, np.ndarray]) -> None:
        """A row of documents, or of a pair, whose sides count one after the other."""
        columns = {name: values[None] for name, values in row.items()}
        self.counts["records"] += 1
        sides = [name for name in columns if name.endswith("input_ids")]
        for side in sides:
            ids, labels = columns[side], columns[side.replace("input_ids", "labels")]
            behind = columns[DOCUMENT_IDS] == 0 if DOCUMENT_IDS in columns else None
            self._count_rows(ids, labels, behind)
        self._keep(columns)

    def _rows(self, ids: np.ndarray, labels: np.ndarray | None) -> None:
        if not len(ids):
            return
        self.counts["records"] += len(ids)
        self._count_rows(ids, labels)
        self._keep({"input_ids": ids} if labels is None else {"input_ids": ids, "labels": labels})

    def _count_rows(self, ids: np.ndarray, labels: np.ndarray | None, behind: np.ndarray | None = None) -> None:
        """``behind``: which tokens are padding; None: those equal to its id at a row's end."""
        counts = self.counts
        counts["loss_tokens"] += loss_tokens(ids, labels, self.checked.loss_pad)
        padding = 0
        if labels is not None:
            if behind is None:
                behind = np.cumsum((ids != self.checked.special.pad)[:, ::-1], axis=1) == 0
            padding = int(behind.sum())
            counts["padding_tokens"] += padding
        if self.checked.unknown >= 0:
            unknown = int((ids == self.checked.unknown).sum())
            counts["unknown_tokens"] += unknown - (padding if self.checked.unknown == self.checked.special.pad else 0)

    def _keep(self, columns: dict[str, np.ndarray]) -> None:
        self.block.append(columns)
        self.block_tokens += sum(column.size for column in columns.values())
        if self.block_tokens >= BLOCK_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self.block:
            joined = {name: np.concatenate([block[name] for block in self.block]) for name in self.block[0]}
            self.writer.write(joined)
        self.block, self.block_tokens = [], 0


def _blocks_of(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        while len(ids := np.fromfile(file, np.int32, BLOCK_TOKENS)):
            yield ids
