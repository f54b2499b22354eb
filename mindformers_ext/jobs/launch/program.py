# SPDX-License-Identifier: Apache-2.0
"""What the launcher must know of the program that starts the workers: msrun or torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.jobs.launch.arguments import Launch


@dataclass(frozen=True, kw_only=True)
class Program:
    """One such program.

    Attributes:
        name: its own output goes to ``LOG_DIR/<name>.log``, with the machine's number behind the name but on the first.
        died: in a line of its output; groups ``pid`` and ``code`` of a worker that has failed.
        rank: the variable that holds a worker's rank, and ``role``: one that every worker has, with its value or None.
        mark: of a worker's line in the program's output, groups ``rank`` and ``text``; None: the program itself writes
            the workers' logs.
        scheduler: name of a log of a process beside the workers, '' where there is none.
    """

    name: str
    died: re.Pattern[str]
    rank: str
    role: tuple[str, str | None]
    mark: re.Pattern[str] | None = None
    scheduler: str = ""

    def log(self, launch: Launch) -> Path:
        """What the program itself says."""
        return launch.log_dir / f"{self.name}{launch.machine}.log"

    def logs(self, launch: Launch) -> list[Path]:
        """All that a job of this machine writes: of an earlier job they would be taken for this one's."""
        beside = [launch.log_dir / self.scheduler] if self.scheduler and not launch.machine else []
        return [*map(launch.log_of, launch.ranks), *beside, self.log(launch)]

    def rank_of(self, environment: Mapping[str, str]) -> int | None:
        """The rank of the worker with this environment; None for any other process."""
        name, value = self.role
        rank = environment.get(self.rank, "")
        is_worker = name in environment and value in (None, environment[name])
        return int(rank) if is_worker and rank.isdecimal() else None


MSRUN = Program(
    name="msrun",
    died=re.compile(r"Worker process (?P<pid>\d+) exit with exception\. Error code: (?P<code>-?\d+)"),
    rank="RANK_ID",
    role=("MS_ROLE", "MS_WORKER"),
    scheduler="scheduler.log",
)
TORCHRUN = Program(
    name="torchrun",
    died=re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: \d+ \(pid: (?P<pid>\d+)\)"),
    rank="RANK",
    role=("TORCHELASTIC_RUN_ID", None),
    mark=re.compile(r"\[worker(?P<rank>\d+)\]:(?P<text>.*)", re.DOTALL),
)
