# SPDX-License-Identifier: Apache-2.0
"""``python tools/make_tiny_corpus.py``: text of the standard library -> tokenizer -> MindRecord."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="make_tiny_corpus.py",
        description="Make a small data set from the documentation inside Python's standard library: train and eval "
        "text, a SentencePiece tokenizer trained on it, and MindRecord files of token rows.",
    )
    result.add_argument("--output_dir", type=Path, required=True, help="folder for all files")
    result.add_argument("--vocab_size", type=int, default=2000, help="pieces of the tokenizer (default 2000)")
    result.add_argument("--seq_length", type=int, default=128, help="rows hold seq_length + 1 tokens (default 128)")
    result.add_argument("--max_bytes", type=int, default=3_000_000, help="stop collecting text there (default 3000000)")
    result.add_argument("--held_out_every", type=int, default=20, help="each n-th document is for eval (default 20)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 on a user's mistake."""
    return exit_code(_run, parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.tiny_corpus import CorpusRequest, make_corpus

    summary = make_corpus(CorpusRequest(**vars(arguments)))
    print(f"{summary.documents} documents, {summary.text_bytes / 1e6:.2f} MB of text, {summary.vocab_size} pieces")
    for name, counts in (("train", summary.train), ("eval", summary.eval)):
        print(
            f"{arguments.output_dir / name}.mindrecord: {counts.rows} rows of {summary.tokens_per_row} tokens "
            f"from {counts.documents} documents; {counts.dropped} tokens at the end filled no row"
        )
    return 0
