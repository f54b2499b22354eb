# SPDX-License-Identifier: Apache-2.0
"""``python tools/make_tiny_corpus.py``: text of the standard library -> tokenizer -> MindRecord."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code
from mindformers_ext.core.errors import UserError

DEFAULTS = {"vocab_size": 2000, "seq_length": 128}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="make_tiny_corpus.py",
        description="Make a small data set from the documentation inside Python's standard library: train and eval "
        "text, a SentencePiece tokenizer trained on it, and MindRecord files of token rows.",
    )
    result.add_argument("--output_dir", type=Path, required=True, help="folder for all files")
    result.add_argument("--config", type=Path, help="take vocab_size and seq_length from this MindFormers YAML")
    result.add_argument("--vocab_size", type=int, help="pieces of the tokenizer (default 2000)")
    result.add_argument("--seq_length", type=int, help="rows hold seq_length + 1 tokens (default 128)")
    result.add_argument("--max_bytes", type=int, default=3_000_000, help="stop collecting text there (default 3000000)")
    result.add_argument("--held_out_every", type=int, default=20, help="each n-th document is for eval (default 20)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 on a user's mistake."""
    return exit_code(_run, parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.tiny_corpus import CorpusRequest, make_corpus

    vocab_size, seq_length = _sizes(arguments)
    request = CorpusRequest(
        output_dir=arguments.output_dir,
        vocab_size=vocab_size,
        seq_length=seq_length,
        max_bytes=arguments.max_bytes,
        held_out_every=arguments.held_out_every,
    )
    summary = make_corpus(request)
    print(f"{summary.documents} documents, {summary.text_bytes / 1e6:.2f} MB of text, {summary.vocab_size} pieces")
    for name, counts in (("train", summary.train), ("eval", summary.eval)):
        print(
            f"{arguments.output_dir / name}.mindrecord: {counts.rows} rows of {summary.tokens_per_row} tokens "
            f"from {counts.documents} documents; {counts.dropped} tokens at the end filled no row"
        )
    return 0


def _sizes(arguments: argparse.Namespace) -> tuple[int, int]:
    """(vocab_size, seq_length), from the YAML or from the options, never from both."""
    given = [name for name in DEFAULTS if getattr(arguments, name) is not None]
    if arguments.config:
        from mindformers_ext.jobs.tiny_model import spec_from_yaml_file

        if given:
            raise UserError(f"--config already says {', '.join(given)}: give the sizes in one place")
        spec = spec_from_yaml_file(arguments.config)
        return spec.model.vocab_size, spec.seq_length
    vocab_size, seq_length = (getattr(arguments, name) if name in given else DEFAULTS[name] for name in DEFAULTS)
    return vocab_size, seq_length
