# SPDX-License-Identifier: Apache-2.0
"""Why a job of several processes failed, as far as its logs tell, and which log to read."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindformers_ext.data.text_lines import lines_of
from mindformers_ext.jobs.launch.arguments import Launch
from mindformers_ext.jobs.launch.program import Program

SHOWN = 12  # lines of a log in a message
WHOLE = 60  # the same of an error of ours, which ends with what to do
WIDTH = 1000  # characters of a line of a log
NAMED = 8  # logs of other workers that are named
ERROR = "error: "  # with which a message of ours starts
_INCOMPLETE = (
    "Failed to initialize distributed job cluster",
    "Failed to initialize the node",
    "RendezvousTimeoutError",
    "The client socket has timed out",
)
_PORT_TAKEN = ("Address already in use", "address already in use", "Failed to bind", "EADDRINUSE")
_NOISE = re.compile(r"^\[(WARNING|INFO|DEBUG)\]|^\s*$|^-+$|C\+\+ Call Stack|^mindspore/|^Traceback|^  | - INFO - ")

Died = tuple[int, int]  # rank and exit code of a worker


def reason(launch: Launch, program: Program, died: Died | None, code: int) -> str:
    """Why the job failed.

    Args:
        launch: the job.
        program: what started its workers.
        died: the first worker that failed, if that is known.
        code: how the program ended, or the only worker where there is no program.
    """
    logs = {rank: _text(launch.log_of(rank)) for rank in launch.ranks if launch.log_of(rank).is_file()}
    own = program.log(launch)
    beside = _text(launch.log_dir / program.scheduler) if program.scheduler else _text(own)
    lines = ["error: the job failed."]
    if any(word in beside for word in _PORT_TAKEN):
        lines.append(f"Port {launch.port} was taken by another program: give another PORT, the same on all machines.")
    elif any(word in text for text in (*logs.values(), beside) for word in _INCOMPLETE):
        lines.append(_incomplete(launch))
    if not logs:
        lines.append(f"No worker has started. What {program.name} said: {own}" if own.is_file() else "Nothing started.")
        return "\n".join([*lines, *_quoted(_end_of(_text(own)))])
    rank, how = _first(launch, logs, died, code)
    lines.append(f"Worker {rank} {how}. " + (f"Its log: {launch.log_of(rank)}" if rank in logs else "It has no log."))
    lines += _quoted(_end_of(logs.get(rank, "")))
    others = [str(launch.log_of(other)) for other in logs if other != rank]
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        lines.append("The other workers of this machine were ended; their logs: " + ", ".join(others[:NAMED]) + more)
    return "\n".join(lines)


def _quoted(lines: Sequence[str]) -> list[str]:
    return [f"  | {line[:WIDTH]}{' ...' if len(line) > WIDTH else ''}" for line in lines]


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


def _first(launch: Launch, logs: Mapping[int, str], died: Died | None, code: int) -> tuple[int, str]:
    """The worker to look at first, and how it ended."""
    if launch.workers == 1:
        return 0, _how(code)
    if died:
        return died[0], _how(died[1])
    broken = [rank for rank, text in logs.items() if ERROR in text or "Traceback" in text]
    return (broken or list(logs))[0], "ended with an error" if broken else "left no error in its log"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    hint = " (from outside: a user, or the system short of memory)" if name == "SIGKILL" else ""
    return f"was ended by signal {name}{hint}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _end_of(text: str) -> list[str]:
    """An error of ours to its end; else the last lines that say something."""
    lines = lines_of(text)
    starts = [place for place, line in enumerate(lines) if line.startswith(ERROR)]
    if starts:
        found = [line for line in lines[starts[-1] :] if not line.startswith(("[WARNING]", "[INFO]", "[DEBUG]"))]
        return found if len(found) <= WHOLE else [*found[:WHOLE], f"... and {len(found) - WHOLE} more lines"]
    return [line for line in lines if not _NOISE.search(line)][-SHOWN:]
