# SPDX-License-Identifier: Apache-2.0
"""``python tools/check_parity.py``: a Hugging Face folder in transformers against a checkpoint in our network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code

TOO_DIFFERENT = 1


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="check_parity.py",
        description="Compare the logits of transformers on a Hugging Face folder with those of our MindSpore network "
        "on a checkpoint. Exit code 1 above the tolerance.",
    )
    result.add_argument("--hf", type=Path, required=True, help="Hugging Face model folder")
    result.add_argument("--ckpt", type=Path, required=True, help="MindSpore .ckpt of the same model")
    result.add_argument("--text", action="append", default=[], help="text to compare on; may be given several times")
    result.add_argument("--tolerance", type=float, default=1e-4, help="largest allowed difference (default 1e-4)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 within the tolerance, 1 above it, 2 on a user's mistake."""
    return exit_code(_run, parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.check_parity import check_parity

    result = check_parity(arguments.hf, arguments.ckpt, arguments.text)
    within = result.difference <= arguments.tolerance  # False for NaN
    print(
        f"compared {result.tokens} tokens x {result.vocab_size} logits (largest {result.largest:.3f}): "
        f"transformers on {result.folder}, MindSpore on {result.checkpoint}"
    )
    sign = "<=" if within else ">"
    print(f"max |logits difference| = {result.difference:.2e} {sign} {arguments.tolerance:g}")
    return 0 if within else TOO_DIFFERENT
