# SPDX-License-Identifier: Apache-2.0
"""Compiles the asked ranks, each in a process of its own, as many at a time as the machine bears."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.jobs.dryrun import DryRunPlan
from mindformers_ext.jobs.dryrun_facts import RankFacts, rank_facts_from_json
from mindformers_ext.jobs.dryrun_stubs import Stubs

RESULT, REQUEST, LOG, GRAPHS = "result.json", "request.json", "log.txt", "graphs"
# Graphs that MindSpore writes: after the cutting, and the last of the front end. Writing all would double the time.
PASSES = "step_parallel_end,validate"
_LAST_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): ?(.*)", re.DOTALL)
ERROR_LINES = 6


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """How ranks are compiled. ``command`` starts a process that reads a request and writes a result."""

    plan: DryRunPlan
    stubs: Stubs
    command: Sequence[str]
    folder: Path
    native: bool = False
    keep_graphs: bool = False
    at_once: int = 1
    timeout: float = 3600.0


def compile_ranks(job: RankJob, done: Callable[[RankFacts], None]) -> list[RankFacts]:
    """Compile every rank of the plan; ``done`` hears of each as it ends. Result in the order of ranks.

    A rank that fails is a result as well (``error``), never an exception. When this process is interrupted, the
    processes it started end with it.
    """
    running: dict[int, subprocess.Popen[bytes]] = {}
    results = []
    if not job.native:  # files of another split would be read as this one's
        shutil.rmtree(Path(job.plan.config["output_dir"]) / "strategy", ignore_errors=True)
    with ThreadPoolExecutor(max_workers=job.at_once) as pool:
        try:
            waiting = [pool.submit(_compile_rank, job, rank, running) for rank in job.plan.ranks]
            for future in as_completed(waiting):
                results.append(future.result())
                done(results[-1])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running.values():
                _end(process)
    return sorted(results, key=lambda facts: facts.rank)


def _compile_rank(job: RankJob, rank: int, running: dict[int, subprocess.Popen[bytes]]) -> RankFacts:
    folder = job.folder / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(folder / GRAPHS, ignore_errors=True)
    plan = job.plan
    # MindFormers' own network writes its strategy files elsewhere: those of ours are for transform_ckpt.py
    root = str(job.folder) if job.native else plan.config["output_dir"]
    request = {"config": {**plan.config, "output_dir": root}, "rows": plan.rows, "folder": str(folder),
               "native": job.native, "rank": rank, "stage": plan.stage(rank), "world": plan.world,
               "shape": asdict(plan.shape) if plan.shape else None,
               "keep_graphs": job.keep_graphs}  # fmt: skip
    (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
    environment = job.stubs.environment(rank, plan.world, os.environ) | {
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder / GRAPHS),
        "MS_DEV_DUMP_IR_PASSES": PASSES,
        "LOCAL_DEFAULT_PATH": root,
        "GLOG_v": "3",
        # as many processes as cores compile at once: more threads in each would only wait for each other
        "OMP_NUM_THREADS": "1",
    }
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen([*job.command, str(folder / REQUEST)], env=environment, stdout=log,
                                   stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)  # fmt: skip
        running[rank] = process
        try:
            code = process.wait(job.timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return _failed(plan, rank, f"did not end within {job.timeout:.0f} s; see {folder / LOG}")
        finally:
            del running[rank]
    if code == 0 and (folder / RESULT).is_file():
        return rank_facts_from_json(folder / RESULT)
    return _failed(plan, rank, f"{error_text(folder / LOG, code)}\n(the whole log: {folder / LOG})")


def keep_result(folder: Path, request: Mapping[str, Any], facts: Mapping[str, Any], **measured: Any) -> None:
    """Write the result of the rank that this process has compiled, and drop the graphs unless they are asked for."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    result = RankFacts(rank=request["rank"], stage=request["stage"], peak_rss=peak, **facts, **measured)
    beside = folder / f".{RESULT}"
    beside.write_text(json.dumps(result.to_json()), encoding="utf-8")
    if not request["keep_graphs"]:
        shutil.rmtree(folder / GRAPHS, ignore_errors=True)
    os.replace(beside, folder / RESULT)


def _failed(plan: DryRunPlan, rank: int, error: str) -> RankFacts:
    return RankFacts(rank=rank, stage=plan.stage(rank), error=error)


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


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: it leads its own session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
