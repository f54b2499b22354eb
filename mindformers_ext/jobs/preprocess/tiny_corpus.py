# SPDX-License-Identifier: Apache-2.0
"""Makes a small corpus out of the standard library's documentation: text for training and evaluation, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.corpus import split_held_out, standard_library_text
from mindformers_ext.data.readers import write_jsonl
from mindformers_ext.data.tokenizers import train_sentencepiece
from mindformers_ext.formats.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """What to make, and where."""

    output_dir: Path
    vocab_size: int = 2000
    max_bytes: int = 3_000_000
    held_out_every: int = 20

    def check(self) -> None:
        """Every size is sensible, or one ``UserError`` lists what is not."""
        problems = Problems("make_tiny_corpus")
        problems.positive("max_bytes", self.max_bytes)
        if self.vocab_size < 400:
            problems.add(f"vocab_size={self.vocab_size}", "256 bytes and 4 control ids come first: give at least 400")
        if self.held_out_every < 2:
            problems.add(f"held_out_every={self.held_out_every}", "give 2 or more, 1 would leave nothing to train on")
        problems.raise_if_any()


@dataclass(frozen=True)
class CorpusSummary:
    """What was made; also written as ``corpus.json``."""

    train_documents: int
    eval_documents: int
    text_bytes: int
    vocab_size: int
    special_ids: dict[str, int]
    tokenizer_sha256: str


def make_corpus(request: CorpusRequest) -> CorpusSummary:
    """Write train.jsonl, eval.jsonl, tokenizer.model and corpus.json; llama_preprocess.py makes token rows of them.

    The same Python version and sizes give the same text and tokenizer.
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
    watched = _progress(train, "training the tokenizer", unit="document")
    tokenizer = train_sentencepiece(watched, tokenizer_file, request.vocab_size)
    summary = CorpusSummary(
        train_documents=len(train),
        eval_documents=len(held_out),
        text_bytes=sum(len(text.encode()) for text in documents),
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        tokenizer_sha256=sha256(tokenizer_file.read_bytes()).hexdigest(),
    )
    write_text(out / "corpus.json", json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _progress(items: Iterable[Any], what: str, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, unit=f" {unit}", mininterval=0.5, dynamic_ncols=True))
