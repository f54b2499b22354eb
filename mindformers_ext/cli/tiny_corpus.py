# SPDX-License-Identifier: Apache-2.0
"""``python tools/make_tiny_corpus.py``: text of the standard library, and a tokenizer trained on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command
from mindformers_ext.core.errors import UserError

DEFAULT_VOCAB = 2000


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all files")
    parser.add_argument("--config", type=Path, help="take vocab_size from this MindFormers YAML")
    parser.add_argument("--vocab_size", type=int, help="pieces of the tokenizer (default 2000)")
    parser.add_argument("--max_bytes", type=int, default=3_000_000, help="stop collecting text there (default 3000000)")
    parser.add_argument("--held_out_every", type=int, default=20, help="each n-th document is for eval (default 20)")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.preprocess.tiny_corpus import CorpusRequest, make_corpus

    request = CorpusRequest(
        output_dir=arguments.output_dir,
        vocab_size=_vocab_size(arguments),
        max_bytes=arguments.max_bytes,
        held_out_every=arguments.held_out_every,
    )
    summary = make_corpus(request)
    out = arguments.output_dir
    print(f"{out / 'train.jsonl'}: {summary.train_documents} documents")
    print(
        f"{out / 'eval.jsonl'}: {summary.eval_documents} documents; {summary.text_bytes / 1e6:.2f} MB of text in both"
    )
    print(f"{out / 'tokenizer.model'}: {summary.vocab_size} pieces")
    return 0


def _vocab_size(arguments: argparse.Namespace) -> int:
    """From the YAML or from the option, never from both."""
    if not arguments.config:
        return DEFAULT_VOCAB if arguments.vocab_size is None else arguments.vocab_size
    from mindformers_ext.jobs.checkpoint.tiny_model import spec_from_yaml_file

    if arguments.vocab_size is not None:
        raise UserError("--config already says vocab_size: give the size in one place")
    return spec_from_yaml_file(arguments.config).model.vocab_size


COMMAND = Command(
    prog="make_tiny_corpus.py",
    description="Make a small corpus from the documentation inside Python's standard library: text for training "
    "and evaluation as JSON lines, and a SentencePiece tokenizer trained on it. "
    "tools/dataset_preprocess/llama/llama_preprocess.py turns them into MindRecord files of token rows.",
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
