# SPDX-License-Identifier: Apache-2.0
"""Ranks that fork off one process: what becomes of one ends it alone, and nothing outlives the dry run.

The process is a real one that imports nothing of MindSpore; what its ranks do stands in each test.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from mindformers_ext.jobs.dryrun.facts import RankFacts
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from mindformers_ext.jobs.dryrun.ranks import RankJob, compile_ranks
from mindformers_ext.jobs.dryrun.stubs import Stubs
from tests.helpers.specs import PRETRAIN_YAML

SERVER = """
import os, signal, sys, time
from pathlib import Path
from mindformers_ext.jobs.dryrun.forks import serve
from mindformers_ext.jobs.dryrun.ranks import keep_result

def load():
    {load}
    print("imported")
    time.sleep(0.1)
    return work

def work(request, tell):
    tell("working")
    print("process", os.getpid(), "rank", os.environ["RANK_ID"], "in", os.getcwd(), flush=True)
    deed = {deeds}.get(request["rank"])
    if deed:
        deed()
    keep_result(Path(request["folder"]), request, {{}}, start_seconds=request["start_seconds"])

serve(Path(sys.argv[-1]), load)
"""


def job(folder: Path, deeds: str = "{}", load: str = "pass", at_once: int = 2, timeout: float = 60.0) -> RankJob:
    """Ranks 0, 1 and 8 of the seed's 16; ``deeds``: what some of them do, ``load``: what is done before the fork."""
    plan = plan_dry_run(yaml.safe_load(PRETRAIN_YAML), "job.yaml", 16, "0,1,8", folder)
    command = (sys.executable, "-c", SERVER.format(deeds=deeds, load=load))
    return RankJob(
        plan=plan,
        stubs=Stubs(folder, folder / "mindspore"),
        command=command,
        folder=folder / "ranks",
        at_once=at_once,
        timeout=timeout,
    )


def compiled(one: RankJob) -> dict[int, str]:
    """The ranks' errors, in the order in which they were told."""
    told: list[RankFacts] = []
    assert {facts.rank: facts for facts in compile_ranks(one, told.append)} == {facts.rank: facts for facts in told}
    return {facts.rank: facts.error for facts in told}


def gone(log: Path) -> bool:
    """Whether the process that wrote this log ends at once (an orphan may stay a zombie)."""
    (number,) = re.findall(r"process (\d+)", log.read_text(encoding="utf-8"))
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            status = Path(f"/proc/{number}/status").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            return True
        if "State:\tZ" in status:
            return True
        time.sleep(0.05)
    return False


def test_each_rank_has_its_own_folder_and_log(tmp_path: Path) -> None:
    told: list[int] = []
    phases: list[tuple[int, str]] = []
    facts = compile_ranks(
        job(tmp_path, at_once=1), lambda one: told.append(one.rank), lambda *phase: phases.append(phase)
    )
    assert phases == [(rank, "working") for rank in (0, 1, 8)]
    assert told == [0, 1, 8] == [one.rank for one in facts] and all(one.compiles for one in facts)
    assert [one.stage for one in facts] == [0, 0, 1]
    assert facts[0].start_seconds > 0.1 and [one.start_seconds for one in facts[1:]] == [0.0, 0.0]
    for rank in told:
        folder = tmp_path / "ranks" / f"rank_{rank}"
        assert (folder / "log.txt").read_text(encoding="utf-8").endswith(f"rank {rank} in {folder}\n")
    assert (tmp_path / "ranks" / "log.txt").read_text(encoding="utf-8") == "imported\n"


@pytest.mark.parametrize(
    "deed, message",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended with signal SIGKILL: process "),
        ("os.abort()", "ended with signal SIGABRT"),
        ("__import__('ctypes').string_at(0)", "ended with signal SIGSEGV"),
        ("int('x')", "ValueError: invalid literal for int()"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("os._exit(0)", "ended with exit code 0"),
    ],
)
def test_a_rank_that_dies_leaves_the_others(deed: str, message: str, tmp_path: Path) -> None:
    errors = compiled(job(tmp_path, f"{{1: lambda: {deed}}}"))
    assert message in errors[1] and "rank_1/log.txt" in errors[1]
    assert errors[0] == errors[8] == ""


def test_a_rank_that_takes_too_long_is_ended_alone(tmp_path: Path) -> None:
    errors = compiled(job(tmp_path, "{0: lambda: time.sleep(3600)}", timeout=1.0))
    assert "did not end within 1 s" in errors[0] and errors[1] == errors[8] == ""
    assert gone(tmp_path / "ranks" / "rank_0" / "log.txt")


def test_imports_that_fail_are_every_ranks_error(tmp_path: Path) -> None:
    errors = compiled(job(tmp_path, load="import no_such_module"))
    assert list(errors) == [0, 1, 8]
    for error in errors.values():
        assert error.startswith("ModuleNotFoundError: No module named 'no_such_module'")
        assert str(tmp_path / "ranks" / "log.txt") in error


def test_when_the_importing_process_is_killed_results_stay_and_ranks_end(tmp_path: Path) -> None:
    deeds = "{1: lambda: time.sleep(60), 8: lambda: (time.sleep(0.3), os.kill(os.getppid(), signal.SIGKILL))}"
    errors = compiled(job(tmp_path, deeds))
    assert errors[0] == ""
    assert "ended with signal SIGKILL" in errors[1] and "ranks/log.txt" in errors[1]
    assert gone(tmp_path / "ranks" / "rank_1" / "log.txt")


def test_an_interrupt_ends_every_process(tmp_path: Path) -> None:
    def interrupted(_: RankFacts) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ranks(job(tmp_path, "{1: lambda: time.sleep(60), 0: lambda: time.sleep(0.3)}"), interrupted)
    assert gone(tmp_path / "ranks" / "rank_1" / "log.txt")


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert compiled(job(tmp_path))[1] == ""
    assert "ModuleNotFoundError" in compiled(job(tmp_path, load="import no_such_module"))[1]
