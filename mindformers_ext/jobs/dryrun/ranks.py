# SPDX-License-Identifier: Apache-2.0
"""Has the asked ranks compiled, each in a process of its own, and hears how each ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.dryrun.facts import RankFacts, rank_facts_from_json
from mindformers_ext.jobs.dryrun.forks import LOG, Ended, Request
from mindformers_ext.jobs.dryrun.plan import DryRunPlan
from mindformers_ext.jobs.dryrun.stubs import Stubs
from mindformers_ext.jobs.launch.supervise import ended_with_us

RESULT, REQUEST, GRAPHS, ORDER = "result.json", "request.json", "graphs", "order.json"
# Graphs that MindSpore writes: after the cutting, and the last of the front end. Writing all would double the time.
PASSES = "step_parallel_end,validate"
_LAST_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): ?(.*)", re.DOTALL)
ERROR_LINES = 6


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """How ranks are compiled. ``command`` starts a process that gets an order's file and serves it."""

    plan: DryRunPlan
    stubs: Stubs
    command: Sequence[str]
    folder: Path
    native: bool = False
    keep_graphs: bool = False
    at_once: int = 1
    timeout: float = 3600.0

    def rank_folder(self, rank: int) -> Path:
        """Where a rank's request, log and result lie."""
        return self.folder / f"rank_{rank}"


def compile_ranks(
    job: RankJob, done: Callable[[RankFacts], None], reached: Callable[[int, str], None] = lambda rank, phase: None
) -> list[RankFacts]:
    """Compile every rank of the plan; ``done`` hears of each as it ends, ``reached`` of each phase of a rank. Result in
    the order of ranks.

    A rank that fails is a result as well (``error``), never an exception. When this process is interrupted, the
    processes it started end with it.
    """
    results: dict[int, RankFacts] = {}

    def tell(facts: RankFacts) -> None:
        results[facts.rank] = facts
        done(facts)

    # MindFormers' own network writes its strategy files elsewhere: those of ours are for transform_ckpt.py
    root = str(job.folder) if job.native else job.plan.config["output_dir"]
    if not job.native:  # files of another split would be read as this one's
        shutil.rmtree(Path(root) / "strategy", ignore_errors=True)
    requests = [str(_request(job, rank, root)) for rank in job.plan.ranks]
    order, log = job.folder / ORDER, job.folder / LOG
    words = {"requests": requests, "at_once": job.at_once, "timeout": job.timeout}
    write_text(order, json.dumps(words))
    with os.fdopen(open_plain(log, AFRESH), "wb") as errors:
        server = subprocess.Popen(
            [*job.command, str(order)],
            env=_environment(job),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=job.folder,
            start_new_session=True,
            preexec_fn=ended_with_us(signal.SIGKILL),  # a signal may come before this call has returned
            text=True,
        )
    with server:
        try:
            for line in server.stdout or ():
                event = json.loads(line)
                if "phase" in event:
                    reached(event["rank"], event["phase"])
                else:
                    tell(_facts(job, Ended(**event)))
        finally:  # what is left of it and of its forks, before its number can be another's
            os.killpg(server.pid, signal.SIGKILL)
    for rank in [rank for rank in job.plan.ranks if rank not in results]:  # the server itself died
        tell(_result(job, rank) or _failed(job, rank, _explained(log, server.returncode)))
    return [results[rank] for rank in job.plan.ranks]


def _request(job: RankJob, rank: int, root: str) -> Path:
    """Clear the rank's folder and write its request."""
    plan, folder = job.plan, job.rank_folder(rank)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    write_text(folder / LOG, "")
    shutil.rmtree(folder / GRAPHS, ignore_errors=True)
    request = {
        "config": {**plan.config, "output_dir": root},
        # without full_batch the ranks share out the rows that are written, and each needs a step's
        "rows": plan.rows * (1 if plan.spec.parallel.full_batch else plan.world),
        "folder": str(folder),
        "native": job.native,
        "rank": rank,
        "stage": plan.stage(rank),
        "keep_graphs": job.keep_graphs,
        "world": plan.world,
        "shape": asdict(plan.shape) if plan.shape else None,
        "environment": {
            "RANK_ID": str(rank),
            "MS_DEV_SAVE_GRAPHS_PATH": str(folder / GRAPHS),
            "LOCAL_DEFAULT_PATH": root,
        },
    }
    path = folder / REQUEST
    write_text(path, json.dumps(request))
    return path


def _environment(job: RankJob) -> dict[str, str]:
    """What all ranks have in common; each request names the rest."""
    return job.stubs.environment(job.plan.ranks[0], job.plan.world, os.environ) | {
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_DUMP_IR_PASSES": PASSES,
        # MindFormers opens log files when it is imported: away from those of the ranks, which each opens for itself
        "LOCAL_DEFAULT_PATH": str(job.folder / "imports"),
        "GLOG_v": "3",
        # as many processes as cores compile at once: more threads in each would only wait for each other
        "OMP_NUM_THREADS": "1",
    }


def _facts(job: RankJob, ended: Ended) -> RankFacts:
    """A rank's result, or why there is none."""
    log = job.rank_folder(ended.rank) / LOG
    if ended.late:
        return _failed(job, ended.rank, f"did not end within {job.timeout:.0f} s; see {log}")
    found = None if ended.code else _result(job, ended.rank)
    return found or _failed(job, ended.rank, _explained(log, ended.code))


def _result(job: RankJob, rank: int) -> RankFacts | None:
    path = job.rank_folder(rank) / RESULT
    return rank_facts_from_json(path) if path.is_file() else None


def keep_result(folder: Path, request: Request, facts: Mapping[str, Any], **measured: Any) -> None:
    """Write the result of the rank that this process has compiled, and drop the graphs unless they are asked for."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    result = RankFacts(rank=request["rank"], stage=request["stage"], peak_rss=peak, **facts, **measured)
    if not request["keep_graphs"]:
        shutil.rmtree(folder / GRAPHS, ignore_errors=True)
    write_text(folder / RESULT, json.dumps(result.to_json()))


def _failed(job: RankJob, rank: int, error: str) -> RankFacts:
    return RankFacts(rank=rank, stage=job.plan.stage(rank), error=error)


def _explained(log: Path, code: int) -> str:
    return f"{error_text(log, code)}\n(the whole log: {log})"


def error_text(log: Path, code: int) -> str:
    """The last exception in a log, a few lines of it, or how the process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [place for place, line in enumerate(lines) if _LAST_ERROR.match(line)]
    if not starts:
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the compiling process ended with {ended}" + (f": {lines[-1]}" if lines else "")
    text = []
    for line in lines[starts[-1] : starts[-1] + ERROR_LINES]:
        if line.startswith(("---", "Traceback")):
            break
        text.append(line.rstrip())
    return "\n".join(filter(None, text))
