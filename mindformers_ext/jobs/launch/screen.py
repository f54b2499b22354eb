# SPDX-License-Identifier: Apache-2.0
"""What of a job's workers is seen on the launcher's terminal: the lines of the first one."""

from __future__ import annotations

from pathlib import Path

from mindformers_ext.jobs.run.display import REPLACED, STAYS, Sink

PIECE = 1 << 20  # bytes read of a log at a time


class Screen:
    """Shows one worker's lines: all of them until it trains with a display of its own, then those alone."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.is_ours = sink, False

    def take(self, line: str) -> None:
        """A line of the worker's log, with its end."""
        text = line.rstrip("\n")
        if text.startswith(STAYS):
            self.is_ours = True
            self.sink.line(text.removeprefix(STAYS))
        elif text.startswith(REPLACED):
            self.is_ours = True
            self.sink.live(text.removeprefix(REPLACED))
        elif not self.is_ours:
            self.sink.line(text)

    def say(self, text: str) -> None:
        """Words of the launcher itself."""
        if self.sink.lives:
            self.sink.live("")
        self.sink.line(text.rstrip("\n"))


class Follower:
    """Reads whole lines of a file that another process writes, from its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.rest = path, 0, b""

    def lines(self) -> list[str]:
        """Those that have come since the last call."""
        found: list[str] = []
        if not self.path.is_file():
            return found
        with self.path.open("rb") as file:
            file.seek(self.at)
            while piece := file.read(PIECE):
                self.at += len(piece)
                *whole, self.rest = (self.rest + piece).split(b"\n")
                found += [line.decode("utf-8", errors="replace") for line in whole]
        return found
