# SPDX-License-Identifier: Apache-2.0
"""One process imports what compiling needs, then forks off a process per rank: the imports are paid for once.

``jobs.dryrun.ranks`` starts it and hears on its stdout what each rank does and how it ended.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from mindformers_ext.core.plain_file import AFRESH, open_plain

LOG = "log.txt"
Request = Mapping[str, Any]
Tell = Callable[[str], None]
Work = Callable[[Request, Tell], None]  # the second argument is told each phase as it begins


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended: its exit code, negative for a signal; ``late`` when its time was over."""

    rank: int
    code: int
    late: bool


@dataclass(frozen=True)
class Reached:
    """A rank has begun a phase of its work."""

    rank: int
    phase: str


def serve(order: Path, load: Callable[[], Work]) -> None:
    """Fork a process for every request that ``order`` lists and write a line of JSON on stdout for all that happens.

    Args:
        order: a file of JSON: ``requests`` (paths of files), ``at_once`` and ``timeout``.
        load: imports whatever the work needs and returns it.
    """
    words = json.loads(order.read_text(encoding="utf-8"))
    requests = [json.loads(Path(path).read_text(encoding="utf-8")) for path in words["requests"]]
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imported modules print is no report
    os.register_at_fork(after_in_child=report.close)  # its end tells that this process is gone
    started = time.monotonic()
    work = load()
    gc.freeze()  # MindSpore collects garbage many times while it compiles, and would look at all imported objects
    loaded = time.monotonic() - started
    requests = [{**request, "start_seconds": 0.0 if place else loaded} for place, request in enumerate(requests)]
    for event in forked(requests, work, words["at_once"], words["timeout"]):
        report.write(json.dumps(asdict(event)) + "\n")
        report.flush()


def forked(requests: Iterable[Request], work: Work, at_once: int, timeout: float) -> Iterator[Ended | Reached]:
    """Do ``work`` for each request in a fork of this process, ``at_once`` at a time; what each does ends it alone."""
    context = multiprocessing.get_context("fork")
    waiting = deque(requests)
    running: dict[int, tuple[Any, int, float]] = {}  # sentinel: process, rank, end of its time
    heard: dict[connection.Connection, int] = {}  # where ranks tell their phases
    while waiting or running:
        while waiting and len(running) < at_once:
            request = waiting.popleft()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_alone, args=(request, work, writer))
            process.start()
            writer.close()
            heard[reader] = request["rank"]
            running[process.sentinel] = process, request["rank"], time.monotonic() + timeout
        left = min(end for _, _, end in running.values()) - time.monotonic()
        ready = connection.wait([*running, *heard], max(left, 0.0))
        for place in [place for place in heard if place in ready]:
            try:
                yield Reached(heard[place], str(place.recv()))
            except EOFError:
                place.close()
                del heard[place]
        for sentinel, (process, rank, end) in list(running.items()):
            late = sentinel not in ready and time.monotonic() >= end
            if late:
                process.kill()
            if late or sentinel in ready:
                process.join()
                del running[sentinel]
                yield Ended(rank, process.exitcode, late)


def _alone(request: Request, work: Work, teller: connection.Connection) -> None:
    """In the fork: the rank's environment, folder and log, then its work. An exception's text goes to the log."""
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    log = open_plain(LOG, AFRESH)
    for stream in (1, 2):
        os.dup2(log, stream)
    work(request, teller.send)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of the process that it was forked from is to be cleaned up here
