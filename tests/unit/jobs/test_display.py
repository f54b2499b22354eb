# SPDX-License-Identifier: Apache-2.0
"""What people see of a training run: few lines in a file, one on a terminal, the first process of several."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cli.training import training
from mindformers_ext.core.config.run import Runner, RunSpec
from mindformers_ext.core.figures import StepFigures
from mindformers_ext.jobs.run import display as shows
from mindformers_ext.jobs.run.display import LAUNCHER, Display, Lines, Terminal, choose_sink, current, shown
from mindformers_ext.jobs.run.metrics_file import StepRecord, record_of
from mindformers_ext.jobs.run.quiet import Passed
from mindformers_ext.jobs.run.watch import Watch

MOST = 40  # lines of a training of any length in a file


def record(step: int, experts: int = 2, overflow: bool = False) -> StepRecord:
    load = np.full((1, experts), 4.0)
    figures = StepFigures(5.25, overflow, 1.0, 0.1, 0.5, 5.0, 0.25, load, np.array([0.125]))
    return record_of(figures, step, 10, 0.5, 1000)


def trained(steps: int, stream: io.StringIO, sink: shows.Sink, first: int = 0, notes: int = 50) -> list[str]:
    """The lines of a run with as much to say as can be."""
    ticks = iter(range(10**9))
    with shown(Display(sink, clock=lambda: float(next(ticks)))) as display:
        for note in range(notes):
            display.say(f"note: {note}")
        for what in ("importing", "opening", shows.COMPILING):
            display.begin(what)
        watch = Watch(lambda *words: None, None, 10, steps, first)
        for step in range(first + 1, min(steps, first + 20000) + 1):
            watch.see(record(step))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(("steps", "first"), [(1, 0), (2, 0), (17, 0), (300, 0), (300, 299), (9000, 20), (10**8, 0)])
def test_a_file_gets_few_lines_whatever_the_length(steps: int, first: int) -> None:
    lines = trained(steps, stream := io.StringIO(), Lines(stream), first)
    assert len(lines) <= MOST
    assert f"{shows.COMPILING} ..." in lines
    assert any(line.startswith(f"{shows.COMPILING}: done in ") and "first step" in line for line in lines)
    places = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    assert places[0] == first + 1 and places == sorted(set(places))
    if steps - first <= 20000:
        assert places[-1] == steps
    if steps == 300:
        assert max(np.diff(places), default=0) <= 300 / shows.EVENLY + 1
    assert "40 more notes and warnings stand in the log" in lines[-1]


def test_all_lengths_are_within_the_bound() -> None:
    for steps in [*range(1, 400), *(10**power for power in range(3, 10))]:
        found = shows.shown_steps(steps)
        assert 1 in found and steps in found and len(found) <= shows.EVENLY + shows.GROWING
        assert min(found) >= 1 and max(found) == steps


def test_a_terminal_has_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = io.StringIO()
    trained(300, stream, Terminal(stream), notes=1)
    lines = [line.split("\r\x1b[K")[-1] for line in stream.getvalue().split("\n")]
    assert lines[0] == "note: 0" and lines[-1] == "" and len(lines) == 6  # note, three works, last figures
    last = "step 300/300  loss 5.2500  aux 0.2500  dropped 12.5%  2,000 tokens/s  0:00:00 left"
    assert lines[-2] == last
    assert f"\r\x1b[K[##########----------] {last.replace('300/', '150/').replace('0:00:00', '0:01:15')}" in (
        stream.getvalue()
    )


def test_the_live_line_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    Terminal(stream).live("x" * 100)
    assert stream.getvalue() == "\r\x1b[K" + "x" * 39


def test_what_experts_and_overflow_add() -> None:
    dense = shows.step_text(record(3, experts=1, overflow=True), 9, 61.0)
    assert dense == "step 3/9  loss 5.2500  overflow: no update  2,000 tokens/s  0:01:01 left"


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, shows.Lines),
        ({"LOCAL_RANK": "0", "RANK": "8"}, shows.Lines),
        ({"LOCAL_RANK": "1", "RANK": "1"}, shows.Nowhere),
        ({"MS_ROLE": "MS_WORKER", "DEVICE_ID": "3"}, shows.Nowhere),
        ({"DEVICE_ID": "3"}, shows.Lines),  # a device of the user's choice, no launcher
        ({LAUNCHER: "live"}, shows.MarkedLive),
    ],
)
def test_one_process_of_a_machine_speaks(environment: dict[str, str], kind: type) -> None:
    assert type(choose_sink(io.StringIO(), environment)) is kind


def test_nothing_is_shown_outside_a_run() -> None:
    current().say("note")
    stream = io.StringIO()
    with shown(Display(Lines(stream), whole=False)):  # a run whose log is seen
        current().say("note")
        current().begin("compiling")
        current().step(record(1), 10, 0.0)
    assert len(stream.getvalue().splitlines()) == 2
    before = stream.getvalue()
    current().say("note")
    assert stream.getvalue() == before


def test_of_a_log_our_warnings_all_errors_and_results_are_passed_on() -> None:
    stream, logger = io.StringIO(), logging.Logger("mindformers")
    logger.addHandler(Passed())

    def log(level: int, path: str, text: str) -> None:
        logger.handle(logging.LogRecord("x", level, path, 1, text, (), None))

    ours, theirs = "/x/mindformers_ext/mf/run.py", "/x/mindformers/core/context.py"
    with shown(Display(Lines(stream))):
        log(logging.INFO, ours, "an info")
        log(logging.WARNING, ours, "of ours")
        log(logging.WARNING, theirs, "of theirs")
        log(logging.ERROR, theirs, "an error of theirs")
        log(logging.INFO, theirs, "Eval result: {}")
    log(logging.ERROR, theirs, "after the run")
    assert stream.getvalue().splitlines() == ["warning: of ours", "error: an error of theirs", "Eval result: {}"]


SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.run.quiet import output_to
print("before")
try:
    with output_to(Path(sys.argv[1])) as stream:
        stream.write("seen\\n")
        print("python")
        os.write(2, b"another language\\n")
        subprocess.run([sys.executable, "-c", "print('child')"])
        {deed}
except BaseException as error:
    print(type(error).__name__)
print("after", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("deed", "name"), [("pass", ""), ("raise UserError('mine')", "UserError"), ("1 / 0", "ZeroDivisionError")]
)
def test_what_a_process_prints_goes_to_the_log_and_its_end_to_the_user(deed: str, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log" / "rank_0" / "output.log"
    script = SCRIPT.replace("{deed}", deed)
    words = [sys.executable, "-c", script, str(log)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout == "before\n" + (f"{name}\n" if name else "")
    where = f"the run failed; all that it has printed: {log}\n" if name == "ZeroDivisionError" else ""
    assert done.stderr == f"seen\n{where}after\n"
    text = log.read_text()
    assert set(text.splitlines()) >= {"another language", "child", "python"}
    assert ("Traceback" in text and name in text) == bool(name)


@pytest.mark.parametrize("kind", ["quiet", "verbose", "a network of MindFormers' own", "launched"])
def test_what_a_training_shows_and_what_it_keeps(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner.MINDFORMERS if "own" in kind else Runner.OWN_LOOP
    if kind == "launched":
        monkeypatch.setenv(LAUNCHER, "lines")
    with training(RunSpec(mode="train", runner=runner, output_dir=str(tmp_path)), ("a note",), kind == "verbose"):
        os.write(2, b"[WARNING] MindSpore\n")
        current().step(record(1), 1, 0.0)
    shown_lines = capfd.readouterr().err.splitlines()
    step, warning = shows.step_text(record(1), 1, 0.0), "[WARNING] MindSpore"
    log = tmp_path / "log" / "rank_0" / "output.log"
    if kind == "quiet":
        assert shown_lines == ["note: a note", f"note: the whole log is {log} (--verbose shows it)", step]
        assert warning in log.read_text()
    elif kind == "launched":
        assert sorted(shown_lines) == sorted([f"{shows.STAYS}note: a note", warning, shows.STAYS + step])
    else:
        assert sorted(shown_lines) == [warning, "note: a note"]
    assert log.exists() == (kind == "quiet")
