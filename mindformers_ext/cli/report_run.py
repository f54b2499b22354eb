# SPDX-License-Identifier: Apache-2.0
"""``python tools/report_run.py output/quickstart``: a page about a training run, and whether it learned."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ext.cli.command import Command

NOT_LEARNED = 1


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run_folder", type=Path, help="the run's output_dir")
    parser.add_argument("--parity", type=Path, help="saved output of check_parity.py; its last line goes in")
    parser.add_argument("--sample", type=Path, help="what the model wrote: text_generation_result.txt")
    parser.add_argument(
        "--max_loss_ratio", type=float, default=0.75, help="mean loss of the last 20 steps over the first 20 (0.75)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.run.report import ReportRequest, report_run

    report = report_run(ReportRequest(**vars(arguments)))
    print(
        f"mean loss of the first {report.edge} steps {report.first_loss:.4f}, of the last {report.last_loss:.4f}: "
        f"ratio {report.ratio:.3f}, {'at most' if report.learned else 'ABOVE'} {arguments.max_loss_ratio:g}"
    )
    print(f"wrote {report.path}")
    return 0 if report.learned else NOT_LEARNED


COMMAND = Command(
    prog="report_run.py",
    description="Write report.md into a run's folder: losses, speed, drops, balance, pictures. Exit code 1 when "
    "the loss did not fall enough.",
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
