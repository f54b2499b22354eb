# SPDX-License-Identifier: Apache-2.0
"""Makes a small data set out of the standard library's documentation: text, tokenizer, MindRecord."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.corpus import split_held_out, standard_library_text
from mindformers_ext.data.packing import PackingCounts, pack
from mindformers_ext.data.readers import write_jsonl
from mindformers_ext.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from mindformers_ext.jobs.engine import RecordStore, open_records

FIELDS = ("input_ids",)


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """What to make, and where."""

    output_dir: Path
    vocab_size: int = 2000
    seq_length: int = 128
    max_bytes: int = 3_000_000
    held_out_every: int = 20

    def check(self) -> None:
        """Every size is sensible, or one ``UserError`` lists what is not."""
        problems = Problems("make_tiny_corpus")
        for name in ("seq_length", "max_bytes"):
            problems.positive(name, getattr(self, name))
        if self.vocab_size < 400:
            problems.add(f"vocab_size={self.vocab_size}", "256 bytes and 4 control ids come first: give at least 400")
        if self.held_out_every < 2:
            problems.add(f"held_out_every={self.held_out_every}", "give 2 or more, 1 would leave nothing to train on")
        problems.raise_if_any()


@dataclass(frozen=True)
class CorpusSummary:
    """What was made; also written as ``corpus.json``."""

    documents: int
    text_bytes: int
    vocab_size: int
    special_ids: dict[str, int]
    tokenizer_sha256: str
    tokens_per_row: int
    train: PackingCounts
    eval: PackingCounts


def make_corpus(request: CorpusRequest) -> CorpusSummary:
    """Write train.jsonl, eval.jsonl, tokenizer.model, train.mindrecord, eval.mindrecord and corpus.json.

    The same Python version and sizes give the same text, tokenizer and rows. Rows hold ``seq_length + 1`` tokens: a
    causal model shifts inside, so S positions need S + 1.
    """
    request.check()
    out = request.output_dir
    out.mkdir(parents=True, exist_ok=True)
    documents = list(_progress(standard_library_text(request.max_bytes), "collecting documents", unit="document"))
    train, held_out = split_held_out(documents, request.held_out_every)
    if not train or not held_out:
        raise UserError(
            f"found {len(documents)} documents in Python's standard library: raise --max_bytes, or install your "
            "distribution's full Python"
        )
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "eval.jsonl", held_out)
    tokenizer_file = out / "tokenizer.model"
    tokenizer = train_sentencepiece(
        _progress(train, "training the tokenizer", unit="document"), tokenizer_file, request.vocab_size
    )
    store = open_records()
    length = request.seq_length + 1
    summary = CorpusSummary(
        documents=len(documents),
        text_bytes=sum(len(text.encode()) for text in documents),
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        tokenizer_sha256=sha256(tokenizer_file.read_bytes()).hexdigest(),
        tokens_per_row=length,
        train=_write_rows(store, tokenizer, train, out / "train.mindrecord", length),
        eval=_write_rows(store, tokenizer, held_out, out / "eval.mindrecord", length),
    )
    (out / "corpus.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _write_rows(
    store: RecordStore, tokenizer: SentencePieceTokenizer, documents: list[str], path: Path, length: int
) -> PackingCounts:
    counts = PackingCounts()
    watched = _progress(documents, f"writing {path.name}", unit="document")
    rows = pack((tokenizer.encode(text, bos=True, eos=True) for text in watched), length, counts)
    store.write(path, ({"input_ids": row} for row in rows), FIELDS)
    return counts


def _progress(items: Iterable[Any], what: str, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, unit=f" {unit}", mininterval=0.5, dynamic_ncols=True))
