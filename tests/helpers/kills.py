# SPDX-License-Identifier: Apache-2.0
"""Commands killed (SIGKILL) at many moments; a process of its own that has computed nothing, so that it may be forked.

    python -m tests.helpers.kills JOB FOLDER KILLS

Half of the kills come right before a change of the file system (a file opened to write, a rename, a removal, an
fsync), spread evenly over those of an undisturbed run; the other half at seeded times. Prints one JSON line: what was
found wrong, how many kills there were, and what the output held after them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SECONDS = 120  # of one run
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.fsync")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Moment:
    """When a run is killed: before its ``change`` (from 1), or after ``seconds``; neither: never."""

    change: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: by this signal), its changes of the file system, its seconds."""

    code: int
    changes: int
    seconds: float


@dataclass
class Found:
    """What a campaign has seen."""

    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    held: Counter[str] = field(default_factory=Counter)

    def check(self, holds: bool, what: str) -> None:
        """``what`` is wrong unless ``holds``."""
        if not holds:
            self.wrong.append(what)

    def text(self) -> str:
        """One line of JSON."""
        return json.dumps({"wrong": self.wrong, "kills": self.kills, "held": self.held})


def forked(deed: Callable[[], int], below: Path, log: Path, moment: Moment | None = None) -> Ended:
    """Run ``deed`` in a fork, whose output ``log`` takes; kill it at ``moment``. Changes ``below`` are counted."""
    moment = moment or Moment()
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(deed, below, log, moment.change, writer)
    os.close(writer)
    if moment.seconds:
        time.sleep(moment.seconds)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reader, "rb") as told:
        changes = int(told.read() or b"0")
    return Ended(code, changes, time.monotonic() - started)


def _child(deed: Callable[[], int], below: Path, log: Path, change: int, writer: int) -> None:
    code, seen = 1, 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = args
            if not isinstance(path, (str, bytes)) or not flags & WRITES or not _is_below(path, below):
                return
        elif event not in CHANGES:
            return
        seen += 1
        if seen == change:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        signal.alarm(MAX_SECONDS)  # its default action is the end
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        plain = os.fsync
        os.fsync = lambda given: (sys.audit("os.fsync"), plain(given))[1]  # it has no event of its own
        sys.addaudithook(watch)
        code = deed()
        os.write(writer, str(seen).encode())
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def _is_below(path: str | bytes, folder: Path) -> bool:
    return os.path.abspath(os.fsdecode(path)).startswith(str(folder) + os.sep)


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder``, hidden ones too, and a hash of its bytes; empty folders have no hash.

    A process that the killed one has started may still be ending, and take its files with it: looked at again then.
    """
    for _ in range(200):
        try:
            return _contents(folder)
        except FileNotFoundError:
            time.sleep(0.02)
    return _contents(folder)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def moments(whole: Ended, count: int, rng: random.Random) -> list[Moment]:
    """``count`` moments of a run like ``whole``: every other one before a change, the rest at times."""
    early = (count + 1) // 2
    places = [1 + round(n * (whole.changes - 1) / max(1, early - 1)) for n in range(early)]
    return [
        Moment(change=places[n // 2]) if n % 2 == 0 else Moment(seconds=whole.seconds * rng.uniform(0.02, 0.95))
        for n in range(count)
    ]


@dataclass(frozen=True)
class Job:
    """A command whose output stands in a folder of its own.

    ``prepare`` makes inputs in a folder; ``words`` is the command line for that folder, the output's, and
    the ``old`` or ``new`` input; ``modules`` are imported before.
    """

    command: str
    modules: tuple[str, ...]
    prepare: Callable[[Path], None]
    words: Callable[[Path, Path, str], list[str]]


class Campaign:
    """The kills of one ``Job`` in ``folder``."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder, self.found = job, folder, Found()
        self.place, self.log = folder / "place", folder / "log.txt"
        for name in (f"mindformers_ext.cli.{job.command}", *job.modules):
            importlib.import_module(name)
        prepared = forked(lambda: job.prepare(folder) or 0, folder, self.log)  # this process starts no threads
        if prepared.code:
            raise RuntimeError(self.log.read_text())
        self.main = importlib.import_module(f"mindformers_ext.cli.{job.command}").main

    def run(self, which: str, moment: Moment | None = None, overwrite: bool = False) -> Ended:
        """The command for the input ``which``."""
        words = self.job.words(self.folder, self.place, which) + ["--overwrite"] * overwrite
        return forked(lambda: self.main(words), self.place, self.log, moment)

    def empty(self) -> None:
        """Nothing stands in the output's folder."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def whole(self, which: str, over: str | None = None) -> tuple[Ended, dict[str, str]]:
        """An undisturbed run, into an empty folder or over another output, and what it writes."""
        self.empty()
        if over:
            self.run(over)
        ended = self.run(which, overwrite=over is not None)
        if ended.code:
            raise RuntimeError(self.log.read_text())
        return ended, contents(self.place)

    def go(self, kills: int, chained: bool = False) -> Found:
        """Half of the kills into an empty folder, half over another output; ``chained``: one rerun behind them all."""
        _, old = self.whole("old")
        for over in (None, "old"):
            ended, new = self.whole("new", over)
            rng = random.Random(f"{self.job.command} {over}")
            number = kills // 2
            self.start(over)
            for place, moment in enumerate(moments(ended, number, rng)):
                where = f"{self.job.command} over {over}, {moment}"
                if not chained and place:
                    self.start(over)
                while (died := self.run("new", moment, overwrite=self.is_there())).code != -signal.SIGKILL:
                    if died.code:
                        raise RuntimeError(f"{where}: exit code {died.code}: {self.log.read_text()[-2000:]}")
                    moment = Moment(max(moment.change - 1, 0), moment.seconds * 0.8)  # it had ended before
                    self.start(over)
                self.found.kills += 1
                self.judge(where, old if over else {}, new)
                if not chained or place + 1 == number:
                    self.again(where, new)
        return self.found

    def start(self, over: str | None) -> None:
        """What stands there before a kill."""
        self.empty()
        if over:
            self.run(over)

    def is_there(self) -> bool:
        """Whether an output can be seen."""
        return bool(outputs(contents(self.place)))

    def judge(self, where: str, old: dict[str, str], new: dict[str, str]) -> None:
        """After a kill each output that a reader would take is the old one or the new one, and whole."""
        seen = outputs(contents(self.place))
        is_old, is_new = seen == outputs(old), seen == outputs(new)
        self.found.held["nothing" if not seen else "old" if is_old else "new" if is_new else "some of them"] += 1
        for name, files in seen.items():
            whole = [found.get(name) for found in (outputs(old), outputs(new))]
            beside_only = name in new and name not in files and files.items() <= {*old.items(), *new.items()}
            if files not in whole and not beside_only and not is_refused(self.place / name):
                self.found.wrong.append(
                    f"{where}: {sorted(files)} of {name} are neither the old output nor the new one"
                )

    def again(self, where: str, new: dict[str, str]) -> None:
        """Run once more: the bytes of an undisturbed run, and nothing else."""
        ended = self.run("new", overwrite=self.is_there())
        self.found.check(
            ended.code == 0, f"{where}: the next run ended with {ended.code}: {self.log.read_text()[-400:]}"
        )
        self.found.check(contents(self.place) == new, f"{where}: the next run left {sorted(contents(self.place))}")


def outputs(found: dict[str, str]) -> dict[str, dict[str, str]]:
    """The visible files of ``found`` by what they belong to: a folder, a rank's file, or the file that readers open."""
    result: dict[str, dict[str, str]] = {}
    for name, mark in found.items():
        if not is_hidden(name):
            owner = name if name.startswith("rank_") else name.split("/")[0]
            owner = next((first for first in FIRST if owner.startswith(first)), owner)
            result.setdefault(owner, {})[name] = mark
    return result


FIRST = ("x.mindrecord", "m.ckpt")  # files that a reader opens; those named after them stand beside


def is_refused(path: Path) -> bool:
    """Whether whoever reads a checkpoint sees that the description beside it is another's."""
    from mindformers_ext.core.errors import UserError
    from mindformers_ext.formats.ms_file import open_checkpoint
    from mindformers_ext.jobs.checkpoint.source import own_meta

    try:
        own_meta(path, open_checkpoint(path))
    except UserError:
        return path.suffix == ".ckpt"
    return False


def is_hidden(name: str) -> bool:
    """Whether no reader looks at it."""
    return any(part.startswith(".") for part in Path(name).parts)


def main(name: str, folder: Path, kills: int) -> Found:
    """The campaign called ``name``."""
    from tests.helpers.kill_jobs import JOBS, train

    if name.startswith("train"):
        return train(name.removeprefix("train "), folder, kills)
    if name.startswith("experts"):
        from tests.helpers.kill_experts import experts

        return experts(name.split()[1:], folder, kills)
    return Campaign(JOBS[name], folder).go(kills, chained=name in ("preprocess", "domains"))


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])).text())
