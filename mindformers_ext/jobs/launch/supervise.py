# SPDX-License-Identifier: Apache-2.0
"""Runs the process that ``jobs.launch.msrun`` describes to its end, and finds out why a job failed.

MindSpore ends a job whose worker died by itself: msrun kills the other workers of its machine at once, the scheduler
gives the job up after 30 s without a sign of life, and with it the workers of the other machines. What is added here:
a job of one machine does not wait for that, nothing stays behind when it fails or the user stops it, and the log to
read is named.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from mindformers_ext.jobs.launch.arguments import Launch
from mindformers_ext.jobs.launch.msrun import SCHEDULER_LOG

GRACE = 120.0  # seconds from a worker's death to the end of the job, at most
GRACE_ALONE = 5.0  # the same where all workers are on this machine: msrun has ended them, only its scheduler waits
STOP_TIME = 15.0  # seconds that msrun gets to stop its workers
SHOWN = 12  # lines of a log in a message
_DIED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")
_INCOMPLETE = ("Failed to initialize distributed job cluster", "Failed to initialize the node")
_PORT_TAKEN = ("Address already in use", "Failed to bind")
_NOISE = re.compile(r"^\[(WARNING|INFO|DEBUG)\]|^\s*$|^-+$|C\+\+ Call Stack|^mindspore/|^Traceback|^  | - INFO - ")

Show = Callable[[str], None]


@dataclass
class _Watched:
    """What was seen of the running job."""

    died: tuple[int, int] | None = None  # pid and code of the first dead worker
    died_at: float = 0.0
    ranks: dict[psutil.Process, int] = field(default_factory=dict)  # of every worker
    stopped: bool = False


def supervise(launch: Launch, command: Sequence[str], environment: Mapping[str, str], show: Show) -> int:
    """Run ``command`` to its end and return its exit code; ``show`` gets its output and, after a failure, the reason.

    SIGINT and SIGTERM stop the job: no worker is left; the code is then 130.
    """
    launch.log_dir.mkdir(parents=True, exist_ok=True)
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
    )
    log = launch.log_of(0) if launch.workers == 1 else None
    reader = threading.Thread(target=_read, args=(process, watched, show, log), daemon=True)
    reader.start()

    def stop(number: int, frame: FrameType | None) -> None:
        watched.stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _wait(process, watched, GRACE if launch.nodes > 1 else GRACE_ALONE)
    finally:
        _end(process, watched)
        for number, handler in before.items():
            signal.signal(number, handler)
    reader.join(timeout=5)
    if watched.stopped:
        show("stopped: all workers of this machine were ended\n")
        return 130
    failed = bool(process.returncode or watched.died)
    if failed:
        ranks = {worker.pid: rank for worker, rank in watched.ranks.items()}
        show(reason(launch, watched.died, ranks, process.returncode))
    return int(failed)


def _read(process: subprocess.Popen, watched: _Watched, show: Show, log: Path | None) -> None:
    """Pass the output on, and note the first worker's death."""
    with open(log or "/dev/null", "w", encoding="utf-8") as file:
        for line in process.stdout or ():
            show(line)
            file.write(line)
            file.flush()
            match = _DIED.search(line)
            if match and watched.died is None:
                watched.died, watched.died_at = (int(match[1]), int(match[2])), time.monotonic()


def _wait(process: subprocess.Popen, watched: _Watched, grace: float) -> None:
    """Until the job ends, the user stops it, or ``grace`` seconds have passed since a worker died."""
    while process.poll() is None and not watched.stopped:
        for child in _children(process.pid):
            rank = _rank(child) if child not in watched.ranks else None
            if rank is not None:
                watched.ranks[child] = rank
        if watched.died and time.monotonic() - watched.died_at > grace:
            return
        time.sleep(0.3)


def _end(process: subprocess.Popen, watched: _Watched) -> None:
    """Nothing of the job may stay: msrun first, then whatever it left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # msrun's own way to end its workers
        try:
            process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for worker in watched.ranks:
        if worker.is_running():  # and no other process has its number now
            _kill_group(worker.pid)
    _kill_group(process.pid)  # scheduler and log readers are in msrun's group


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


def _rank(process: psutil.Process) -> int | None:
    """The rank of a worker process; None for any other."""
    try:
        words = process.environ()
    except psutil.Error:
        return None
    if words.get("MS_ROLE") == "MS_WORKER" and words.get("RANK_ID", "").isdecimal():
        return int(words["RANK_ID"])
    return None


def reason(launch: Launch, died: tuple[int, int] | None, ranks: Mapping[int, int], code: int) -> str:
    """Why the job failed, as far as its logs tell, and which log to read."""
    logs = {rank: _text(launch.log_of(rank)) for rank in launch.ranks}
    scheduler = _text(launch.log_dir / SCHEDULER_LOG)
    lines = ["\nerror: the job failed."]
    if any(word in scheduler for word in _PORT_TAKEN):
        lines.append(f"Port {launch.port} was taken by another program: give another PORT, the same on all machines.")
    elif any(word in text for text in logs.values() for word in _INCOMPLETE):
        lines.append(_incomplete(launch))
    rank, how = _first(launch, logs, died, ranks, code)
    lines.append(f"Worker {rank} {how}. Its log: {launch.log_of(rank)}")
    lines += [f"  | {line[:200]}" for line in _end_of(logs[rank])]
    others = [str(launch.log_of(other)) for other in launch.ranks if other != rank]
    if others:
        lines.append("The other workers of this machine were ended; their logs: " + ", ".join(others[:8]))
    return "\n".join(lines) + "\n"


def _incomplete(launch: Launch) -> str:
    if launch.node_rank > 0:
        return (
            f"The master {launch.master_addr}:{launch.port} did not answer, or the cluster was not complete, within "
            f"{launch.timeout} s: start the launcher on the master (NODE_RANK 0), give all machines the same "
            "MASTER_ADDR, PORT and WORKERS, and check that no firewall closes the port."
        )
    missing = f": are the launchers of NODE_RANK 1 to {launch.nodes - 1} running" if launch.nodes > 1 else ""
    return (
        f"Not all of the {launch.workers} workers came within {launch.timeout} s{missing}? Look into the logs, or "
        "give a longer TIMEOUT."
    )


def _first(
    launch: Launch, logs: Mapping[int, str], died: tuple[int, int] | None, ranks: Mapping[int, int], code: int
) -> tuple[int, str]:
    """The worker to look at first, and how it ended."""
    if launch.workers == 1:
        return 0, _how(code)
    if died and died[0] in ranks:
        return ranks[died[0]], _how(died[1])
    broken = [rank for rank, text in logs.items() if "error: " in text or "Traceback" in text]
    return (broken or list(launch.ranks))[0], "ended with an error" if broken else "left no error in its log"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    hint = " (from outside: a user, or the system short of memory)" if name == "SIGKILL" else ""
    return f"was ended by signal {name}{hint}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _end_of(text: str) -> list[str]:
    """The last lines that say something."""
    return [line for line in text.splitlines() if not _NOISE.search(line)][-SHOWN:]
