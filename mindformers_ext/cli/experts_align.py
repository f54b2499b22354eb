# SPDX-License-Identifier: Apache-2.0
"""``align``: a LLaMA-MoE v2 whose layers add what the dense model's add, in mean and variance of each channel."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_ext.cli.experts_effects import CALIBRATION, check_effects
from mindformers_ext.cli.experts_flags import (
    add_calibration,
    add_conversations,
    add_model_output,
    add_writing,
    calibration,
    tell_report,
)
from mindformers_ext.cli.model_folder import output_of

EFFECTS = CALIBRATION


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="LLaMA-MoE v2 that convert --style wrote")
    text = "what distribution wrote of the dense model, on the same texts"
    add("--distribution_file", type=Path, required=True, metavar="FILE", help=text)
    add("--save_path", type=Path, required=True, help="folder to write")
    add_model_output(parser)
    add_calibration(parser)
    add_conversations(parser)
    add_writing(parser)


def run(words: argparse.Namespace) -> int:
    """Write the aligned model, and say what was done to it."""
    from mindformers_ext.jobs.experts.v2.align import AlignRequest, align

    check_effects(words, sys.modules[__name__])
    request = AlignRequest(
        calibration=calibration(words), distribution=words.distribution_file, output=output_of(words, words.save_path)
    )
    report = align(request, not words.dry_run, lambda line: print(line, flush=True))
    tell_report(words.save_path, report, words.quiet)
    return 0
