# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine that work on items, and end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Queue, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ext.core.errors import UserError

if TYPE_CHECKING:
    from mindformers_ext.jobs.items.map_items import Work

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Fault(NamedTuple):
    """What an item ended with instead of a result."""

    error: Exception


@dataclass(frozen=True)
class _Member:
    """A process at work. Its pipe is its own, so that the end of the process is the end of the pipe: with one pipe for
    all, half a result of a killed process would be waited for without end."""

    process: BaseProcess
    pipe: Connection


class Team:
    """``workers`` processes; see ``jobs.items.window.Handing``."""

    def __init__(self, work: Work, workers: int, fork: bool, ordered: bool) -> None:
        """Start them. A forked one begins with what ``work.start`` made here."""
        self.work, self.size, self._ordered = work, workers, ordered
        state = work.start(*work.given) if fork else None
        with nullcontext() if fork else _threads_each(max(1, len(os.sched_getaffinity(0)) // workers)):
            self._members = [_begin(work, state, fork) for _ in range(workers)]
        self._free: Queue[Connection] = Queue()
        for member in self._members:
            self._free.put(member.pipe)
        self._threads = ThreadPoolExecutor(workers)  # begins after the forks
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()  # as_completed holds locks that a signal leaves held

    def submit(self, item: Any) -> Future[Any]:
        """Begin an item."""
        future = self._threads.submit(self._done, item)
        if not self._ordered:  # or every result would stay here
            future.add_done_callback(self._ended.put)
        return future

    def result(self, ticket: Future[Any]) -> Any:
        """The item's result."""
        return ticket.result()

    def finished(self) -> Any:
        """The result of the item that is finished next."""
        return self._ended.get().result()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for member in self._members:
            member.process.kill()  # whoever waits for it hears the end of its pipe
        self._threads.shutdown(wait=True, cancel_futures=True)
        for member in self._members:
            member.process.join()
            member.pipe.close()

    def _done(self, item: Any) -> Any:
        """The item as one of the free processes does it."""
        pipe = self._free.get()
        try:
            pipe.send(item)
            found = pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"a process of {self.work.name} ended before its work was done, probably for want of memory: "
                f"{self.work.advice}"
            ) from error
        finally:
            self._free.put(pipe)
        if isinstance(found, Fault):
            raise found.error
        return found


def _begin(work: Work, state: Any, fork: bool) -> _Member:
    # forked: no thread of Python runs yet, and a process that starts from nothing would first import everything again
    context: Any = multiprocessing.get_context(
        "fork" if fork else "spawn"
    )  # threads of torch do not live through a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, state, fork, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Member(process, ours)


def _serve(work: Work, state: Any, started: bool, pipe: Connection, parent: int) -> None:
    """In the process: work on what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has its parent's handler, which unwinds
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            if not started:
                state, started = work.start(*work.given), True
            found = work.do(state, item)
        except Exception as error:  # noqa: BLE001 goes to the process that asked
            found = Fault(error)
        pipe.send(found)


def end_with_parent(parent: int) -> None:
    """A process whose parent was killed would wait for items for ever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


@contextmanager
def _threads_each(count: int) -> Iterator[None]:
    """Processes started inside compute with ``count`` threads, unless the user has said otherwise."""
    added = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, str(count)))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
