# SPDX-License-Identifier: Apache-2.0
"""Work on layers in several processes that share the machine's cores and end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.transform_workers import end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    stage: str,
    start: Callable[..., object] | None = None,
    given: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """``work`` of every job, as they end; ``start(*given)`` runs first in each process. Nothing outlives the generator.

    Raises:
        UserError: a process of the ``stage`` was killed; what ``work`` raises.
    """
    with _threads_each(max(1, len(os.sched_getaffinity(0)) // workers)):
        context = multiprocessing.get_context("spawn")  # threads of torch do not live through a fork
        pool = ProcessPoolExecutor(workers, context, _begin, (os.getpid(), start, given))
        try:
            ended: SimpleQueue[Future[Result]] = SimpleQueue()  # as_completed holds locks that a signal leaves held
            for job in jobs:
                pool.submit(work, job).add_done_callback(ended.put)
            for _ in jobs:
                yield ended.get().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process of {stage} ended before its work was done, probably for want of memory: use fewer "
                "--workers and run the same command again, which keeps the finished layers"
            ) from error
        finally:
            for process in list((pool._processes or {}).values()):
                process.kill()  # an interrupted stage waits for no layer
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, start: Callable[..., object] | None, given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends them
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    if start is not None:
        start(*given)


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
