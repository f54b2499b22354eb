# SPDX-License-Identifier: Apache-2.0
"""What people see of a training run: one live line on a terminal, a line now and then in a file, and what matters else.

Everything else that a run says stands in its log (``jobs.run.quiet``). Steps come from ``jobs.run.watch``, whichever
loop runs them. Of the processes of a job the first one of each machine speaks, through the launcher's terminal: its
lines bear a mark there, by which the launcher tells them from the rest of the worker's log.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from mindformers_ext.jobs.run.metrics_file import StepRecord

LAUNCHER = "MFEXT_LAUNCHER"  # set by our launchers for their workers: LINES, or LIVE where they are on a terminal
LINES, LIVE = "lines", "live"
STAYS, REPLACED = "train| ", "train~ "  # marks of a line that stays and of one that the next line replaces
EVENLY, GROWING = 14, 8  # progress lines of a run in a file: even spaces, and before them growing ones
OTHERS = 10  # notes and warnings shown at most; the log holds all
LONGEST = 600  # characters of one of them
MOMENT = 0.2  # seconds between two pictures of the live line
BAR = 20
CLEAR = "\r\x1b[K"
COMPILING = "compiling the training step"


class Sink(Protocol):
    """Where lines go. ``lives``: a line can be replaced by the next one."""

    lives: bool

    def line(self, text: str) -> None:
        """A line that stays."""
        ...

    def live(self, text: str) -> None:
        """A line that stays until the next one."""
        ...


class Nowhere:
    """Shows nothing."""

    lives = False

    def line(self, text: str) -> None:
        """Nothing."""

    def live(self, text: str) -> None:
        """Nothing."""


class Lines(Nowhere):
    """A stream that keeps what it gets, such as a file; ``mark`` stands before each line."""

    def __init__(self, stream: TextIO, mark: str = "") -> None:
        self.stream, self.mark = stream, mark

    def line(self, text: str) -> None:
        """Write it."""
        self.stream.write(f"{self.mark}{text}\n")
        self.stream.flush()


class MarkedLive(Lines):
    """The same in a worker's log, for a launcher on a terminal."""

    lives = True

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, STAYS)

    def live(self, text: str) -> None:
        """Write it under the mark of lines that are replaced."""
        self.stream.write(f"{REPLACED}{text}\n")
        self.stream.flush()


class Terminal:
    """A terminal: its last line is rewritten."""

    lives = True

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.shown = stream, ""

    def line(self, text: str) -> None:
        """Write it above the live line."""
        self.stream.write(f"{CLEAR if self.shown else ''}{text}\n{self.shown}")
        self.stream.flush()

    def live(self, text: str) -> None:
        """Replace the live line; '' takes it away."""
        self.shown = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self.stream.write(CLEAR + self.shown)
        self.stream.flush()


def choose_sink(stream: TextIO, environment: Mapping[str, str]) -> Sink:
    """Where this process of a job shows what people see: ``stream``, or nowhere if it is not the first of a machine."""
    rank = environment.get("LOCAL_RANK") or environment.get("DEVICE_ID" if environment.get("MS_ROLE") else "", "0")
    if rank.isdecimal() and int(rank):
        return Nowhere()
    launcher = environment.get(LAUNCHER)
    if launcher:
        return MarkedLive(stream) if launcher == LIVE else Lines(stream, STAYS)
    return Terminal(stream) if stream.isatty() and environment.get("TERM") != "dumb" else Lines(stream)


def shown_steps(steps: int, first: int = 0) -> frozenset[int]:
    """The steps above ``first`` up to ``steps`` that get a line in a file: at most ``GROWING`` + ``EVENLY`` of them.

    The first ones follow soon, in growing spaces; from then on spaces are even, so that no part of a long run is dark.
    """
    span = steps - first
    if span <= 0:
        return frozenset()
    even = {round(span * part / EVENLY) for part in range(1, EVENLY + 1)}
    start = max(span / EVENLY, 1.0)
    growing = {round(start ** (place / GROWING)) for place in range(GROWING)}
    return frozenset(first + max(step, 1) for step in even | growing)


class Display:
    """Shows one run.

    Args:
        sink: where.
        whole: whether all is shown; otherwise only what takes long, for a run whose log can be seen.
        each: stands behind tokens per second, which are those of this process.
        clock: seconds.
    """

    def __init__(
        self, sink: Sink, whole: bool = True, each: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sink, self.whole, self.each, self.clock = sink, whole, each, clock
        self.others = 0
        self.work: tuple[str, float] | None = None
        self.plan: tuple[int, frozenset[int]] = (-1, frozenset())
        self.next_picture = 0.0
        self.last = ""

    def say(self, text: str) -> None:
        """A note or a warning. Those above ``OTHERS`` are counted only."""
        self.others += self.whole
        if self.whole and self.others <= OTHERS:
            text = " ".join(text.split())
            self.sink.line(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")

    def begin(self, what: str) -> None:
        """Something that takes long starts, in the -ing form."""
        self.done()
        self.work = what, self.clock()
        self.sink.live(f"{what} ...") if self.sink.lives else self.sink.line(f"{what} ...")

    def done(self, also: str = "") -> None:
        """It has ended, with ``also``."""
        if self.work:
            what, since = self.work
            self.work = None
            if self.sink.lives:
                self.sink.live("")
            self.sink.line(f"{what}: done in {self.clock() - since:.1f} s{also}")

    def step(self, record: StepRecord, steps: int, left: float | None) -> None:
        """A step of ``steps`` is done, ``left`` seconds remain; None after the first one, whose time tells nothing."""
        self.done(", the first step included")
        if not self.whole:
            return
        if self.plan[0] != steps:
            self.plan = steps, shown_steps(steps, record.step - 1)
        if self.sink.lives:
            now = self.clock()
            self.last = step_text(record, steps, left, self.each)
            if now >= self.next_picture or record.step >= steps:
                self.sink.live(f"[{bar(record.step, steps)}] {self.last}")
                self.next_picture = now + MOMENT
        elif record.step in self.plan[1]:
            self.sink.line(step_text(record, steps, left, self.each))

    def end(self) -> None:
        """The run is over: the live line's last figures stay, and what was not shown is counted."""
        self.work = None
        if self.sink.lives:
            self.sink.live("")
            if self.last:
                self.sink.line(self.last)
                self.last = ""
        if self.others > OTHERS:
            self.sink.line(f"{self.others - OTHERS} more notes and warnings stand in the log")


def bar(step: int, steps: int) -> str:
    """How much is done."""
    full = BAR * min(step, steps) // max(steps, 1)
    return "#" * full + "-" * (BAR - full)


def step_text(record: StepRecord, steps: int, left: float | None, each: str = "") -> str:
    """A step's figures in one line; those of experts where there are any, those of time where they are known."""
    parts = [f"step {record.step}/{steps}", f"loss {record.loss:.4f}"]
    if record.has_experts:
        parts += [f"aux {record.aux_loss:.4f}", f"dropped {100 * record.drop_rate:.1f}%"]
    if record.overflow:
        parts.append("overflow: no update")
    if left is not None:
        parts += [f"{record.tokens_per_second:,.0f} tokens/s{each}", f"{timedelta(seconds=int(max(left, 0)))} left"]
    return "  ".join(parts)


_current = Display(Nowhere())


def current() -> Display:
    """The display of the run in this process; one that shows nothing outside ``shown``."""
    return _current


@contextmanager
def shown(display: Display) -> Iterator[Display]:
    """Inside, the run is shown on ``display``."""
    global _current
    before, _current = _current, display
    try:
        yield display
    finally:
        _current = before
        display.end()


@contextmanager
def compilations(stream: TextIO) -> Iterator[None]:
    """Inside, only what takes long is shown, for jobs that print themselves: one line as it starts, one as it ends."""
    with shown(Display(Lines(stream), whole=False)):
        yield
