# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py`` while it trains: what goes to the terminal, what to the log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mindformers_ext.core.config.run import Runner, RunSpec
from mindformers_ext.jobs.run.checks import launched
from mindformers_ext.jobs.run.display import LAUNCHER, Display, choose_sink, compilations, shown
from mindformers_ext.jobs.run.quiet import OUTPUT, output_to, rank_of


@contextmanager
def training(run: RunSpec, notes: Sequence[str], verbose: bool) -> Iterator[None]:
    """Inside, ``run`` trains: one live line and what matters; ``verbose``: all that anybody prints.

    A network of MindFormers' own is trained by its own steps, which our display does not see: its log is shown.
    """
    if verbose or (run.runner is Runner.MINDFORMERS and run.family is None):
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        with compilations(sys.stderr):
            yield
        return
    if os.environ.get(LAUNCHER):  # the worker's own log is the launcher's file
        with _display(run, sys.stderr, notes):
            yield
        return
    log = Path(run.output_dir) / "log" / f"rank_{rank_of(os.environ)}" / OUTPUT
    with output_to(log) as stream, _display(run, stream, notes) as display:
        display.say(f"note: the whole log is {log} (--verbose shows it)")
        yield


@contextmanager
def _display(run: RunSpec, stream: TextIO, notes: Sequence[str]) -> Iterator[Display]:
    several = launched(run.engine) and run.use_parallel
    with shown(Display(choose_sink(stream, os.environ), each=" per process" if several else "")) as display:
        for note in notes:
            display.say(f"note: {note}")
        yield display
