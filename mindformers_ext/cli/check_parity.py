# SPDX-License-Identifier: Apache-2.0
"""``python tools/check_parity.py``: a Hugging Face folder in transformers against a checkpoint in our network."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command, add_switch, optional_path
from mindformers_ext.core.errors import LISTED

DIFFERENT = 1

EPILOG = """examples:
  python tools/check_parity.py --hf Mixtral-8x7B-v0.1 --ckpt mixtral.ckpt --text "I love Beijing, because"
  python tools/check_parity.py --hf Mixtral-8x7B-v0.1 --ckpt gmm.ckpt --weights_only
"""


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--ckpt", type=Path, required=True, help="MindSpore checkpoint of the same model")
    parser.add_argument("--text", action="append", default=[], help="text to compare on; may be given several times")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest allowed difference (default 1e-4)")
    parser.add_argument(
        "--strategy_dir",
        type=optional_path,
        help="with --weights_only: strategy files, if --ckpt is the folder above rank_0, rank_1, ...",
    )
    add_switch(parser, "--weights_only", text="compare tensors instead of logits")


def _run(arguments: argparse.Namespace) -> int:
    return (_weights if arguments.weights_only else _logits)(arguments)


def _logits(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.parity import check_parity

    result = check_parity(arguments.hf, arguments.ckpt, arguments.text)
    within = result.difference <= arguments.tolerance  # False for NaN
    print(
        f"compared {result.tokens} tokens x {result.vocab_size} logits (largest {result.largest:.3f}): "
        f"transformers on {result.folder}, MindSpore on {result.checkpoint}"
    )
    sign = "<=" if within else ">"
    print(f"max |logits difference| = {result.difference:.2e} {sign} {arguments.tolerance:g}")
    return 0 if within else DIFFERENT


def _weights(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.compare import compare_weights

    result = compare_weights(arguments.hf, arguments.ckpt, arguments.strategy_dir)
    for name, difference in result.different[:LISTED]:
        print(f"differs: {name}, by up to {difference:.3e}")
    if len(result.different) > LISTED:
        print(f"and {len(result.different) - LISTED} more")
    cast = f", Hugging Face's cast to {result.cast_to}" if result.cast_to else ""
    equal = result.tensors - len(result.different)
    print(f"{equal} of {result.tensors} tensors are bit-equal (checkpoint {result.layout}{cast})")
    return DIFFERENT if result.different else 0


COMMAND = Command(
    prog="check_parity.py",
    description="Compare the logits of transformers on a Hugging Face folder with those of our MindSpore network "
    "on a checkpoint of any layout; or, with --weights_only, every tensor, without loading a framework. Exit code "
    "1 above the tolerance, or when a tensor differs.",
    epilog=EPILOG,
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
