# SPDX-License-Identifier: Apache-2.0
"""Runs the process that ``jobs.launch.msrun`` or ``jobs.launch.torchrun`` describes to its end.

Both programs end a job whose worker died: msrun kills the other workers of its machine at once, its scheduler
gives the job up after 30 s without a sign of life, and with it the workers of the other machines. What is added here:
a job of one machine does not wait for that, nothing stays behind when it fails, the user stops it or the launcher is
killed, each worker's log is ``LOG_DIR/worker_<rank>.log``, the first one's is shown, and a failure is explained.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.jobs.launch.arguments import Launch
from mindformers_ext.jobs.launch.program import Program
from mindformers_ext.jobs.launch.screen import Follower, Screen
from mindformers_ext.jobs.launch.verdict import reason

GRACE = 120.0  # seconds from a worker's death to the end of the job, at most
GRACE_ALONE = 5.0  # the same where all workers are on this machine: they have been ended, only a scheduler waits
STOP_TIME = 15.0  # seconds that the program gets to stop its workers
LOOK = 0.3  # seconds between two looks at the job
INTERRUPTED = 130
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass
class _Watched:
    """What was seen of the running job."""

    died: tuple[int, int] | None = None  # pid and code of the first dead worker
    died_at: float = 0.0
    ranks: dict[psutil.Process, int] = field(default_factory=dict)  # of every worker
    stopped: bool = False


def supervise(
    launch: Launch, program: Program, command: Sequence[str], environment: Mapping[str, str], screen: Screen
) -> int:
    """Run ``command`` to its end and return its exit code; ``screen`` gets what the first worker says and, after a
    failure, the reason.

    SIGINT and SIGTERM stop the job: no worker is left; the code is then 130.
    """
    launch.log_dir.mkdir(parents=True, exist_ok=True)
    for path in program.logs(launch):
        path.unlink(missing_ok=True)
    watched = _Watched()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        errors="replace",
        preexec_fn=ended_with_us(signal.SIGINT),  # which ends its workers, too
    )
    reader = threading.Thread(target=_read, args=(process, launch, program, watched, screen), daemon=True)
    reader.start()

    def stop(number: int, frame: FrameType | None) -> None:
        watched.stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    follows = launch.workers > 1 and program.mark is None
    follower = Follower(launch.log_of(launch.ranks[0])) if follows else None
    try:
        _wait(process, program, watched, GRACE if launch.nodes > 1 else GRACE_ALONE, follower, screen)
    finally:
        _end(process, watched)
        for number, handler in before.items():
            signal.signal(number, handler)
    reader.join(timeout=5)
    if program.mark:  # the same lines once more, where torchrun keeps them
        shutil.rmtree(program.log(launch).with_suffix(""), ignore_errors=True)
    _show(follower, screen)
    if watched.stopped:
        screen.say("stopped: all workers of this machine were ended")
        return INTERRUPTED
    failed = bool(process.returncode or watched.died)
    if failed:
        ranks = {worker.pid: rank for worker, rank in watched.ranks.items()}
        died = (ranks[watched.died[0]], watched.died[1]) if watched.died and watched.died[0] in ranks else None
        screen.say("\n" + reason(launch, program, died, process.returncode))
    return int(failed)


def ended_with_us(number: int) -> Callable[[], None]:
    """In the new process: when the thread that starts it ends, however it does, it gets this signal."""
    libc, wanted = ctypes.CDLL(None), int(number)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, wanted)


def _read(process: subprocess.Popen, launch: Launch, program: Program, watched: _Watched, screen: Screen) -> None:
    """Give each line of the output its log, show the first worker's, and note the first worker's death."""
    first = launch.ranks[0]
    with ExitStack() as files:
        paths = {rank: launch.log_of(rank) for rank in launch.ranks} if program.mark or launch.workers == 1 else {}
        logs = {rank: files.enter_context(_opened(path)) for rank, path in paths.items()}
        own = files.enter_context(_opened(program.log(launch))) if launch.workers > 1 else None
        for line in process.stdout or ():
            match = program.mark.match(line) if program.mark and own else None
            rank = int(match["rank"]) if match else (None if own else first)
            text = match["text"] if match else line
            file = logs.get(rank, own) if rank is not None else own
            if file:
                file.write(text)
                file.flush()
            if rank == first:
                screen.take(text)
            found = program.died.search(line) if rank is None else None
            if found and watched.died is None:
                watched.died, watched.died_at = (int(found["pid"]), int(found["code"])), time.monotonic()


def _opened(path: Path) -> TextIO:
    return os.fdopen(open_plain(path, AFRESH), "w", encoding="utf-8")


def _wait(
    process: subprocess.Popen,
    program: Program,
    watched: _Watched,
    grace: float,
    follower: Follower | None,
    screen: Screen,
) -> None:
    """Until the job ends, the user stops it, or ``grace`` seconds have passed since a worker died."""
    while process.poll() is None and not watched.stopped:
        for child in _children(process.pid):
            rank = _rank(child, program) if child not in watched.ranks else None
            if rank is not None:
                watched.ranks[child] = rank
        _show(follower, screen)
        if watched.died and time.monotonic() - watched.died_at > grace:
            return
        time.sleep(LOOK)


def _show(follower: Follower | None, screen: Screen) -> None:
    for line in follower.lines() if follower else ():
        screen.take(line)


def _end(process: subprocess.Popen, watched: _Watched) -> None:
    """Nothing of the job may stay: the program first, then whatever it left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # its own way to end its workers
        try:
            process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for worker in watched.ranks:
        if worker.is_running():  # and no other process has its number now
            _kill_group(worker.pid)
    _kill_group(process.pid)  # a scheduler is in the program's group


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _rank(process: psutil.Process, program: Program) -> int | None:
    try:
        return program.rank_of(process.environ())
    except psutil.Error:
        return None
