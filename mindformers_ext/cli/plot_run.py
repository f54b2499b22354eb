# SPDX-License-Identifier: Apache-2.0
"""``python tools/plot_run.py output/quickstart``: loss curve and expert load of a training run as PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run_folder", type=Path, help="the run's output_dir; the pictures are written there")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.run.plot import plot_run

    for picture in plot_run(arguments.run_folder):
        print(f"wrote {picture}")
    return 0


COMMAND = Command(
    prog="plot_run.py",
    description="Plot a training run of run_mindformer.py from its metrics: loss.png (loss, LM loss, aux loss, "
    "learning rate) and, with experts, expert_load.png (share of tokens per expert, imbalance, drops).",
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
