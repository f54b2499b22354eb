# SPDX-License-Identifier: Apache-2.0
"""What a dry run shows while it compiles: phases, ends, and how long it will take."""

from __future__ import annotations

import io
from pathlib import Path

import yaml

from mindformers_ext.jobs.dryrun.facts import RankFacts
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from mindformers_ext.jobs.dryrun.progress import DryRunProgress, expected_rank_seconds
from mindformers_ext.jobs.run.display import Lines, Terminal
from tests.helpers.specs import PRETRAIN_YAML


def progress(folder: Path, sink: Lines | Terminal, at_once: int, now: list[float]) -> DryRunProgress:
    plan = plan_dry_run(yaml.safe_load(PRETRAIN_YAML), "job.yaml", 16, "0,1,8", folder)
    return DryRunProgress(plan, at_once, sink, "job.yaml", clock=lambda: now[0])


def test_each_phase_of_each_rank_is_a_line_in_a_file(tmp_path: Path) -> None:
    now, stream = [0.0], io.StringIO()
    shown = progress(tmp_path, Lines(stream), 1, now)
    each = expected_rank_seconds(shown.plan, 0)
    assert shown.left() == 20 + 3 * each and each > 5  # imports, then one at a time
    now[0] = 22.0
    shown.reached(0, "building the network")
    now[0] += each  # twice as long as expected
    shown.reached(0, "compiling")
    now[0] += each
    shown.ended(RankFacts(rank=0, stage=0, start_seconds=22, build_seconds=each, compile_seconds=each))
    assert round(shown.left()) == round(2 * 2 * each)
    shown.reached(1, "compiling")
    shown.ended(RankFacts(rank=1, stage=0, error="no"))
    shown.ended(RankFacts(rank=8, stage=1))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("compiling job.yaml: 3 of 16 ranks (0, 1, 8), 1 at a time; about ")
    assert lines[1:4] == [
        "importing MindFormers: done in 22 s",
        "rank 0: building the network ...",
        "rank 0: compiling ...",
    ]
    assert f"rank 0: compiles ({22 + 2 * each:.0f} s), 1 of 3 done, about " in lines[4]
    assert "rank 1: FAILS (0 s), 2 of 3 done, about " in lines[6] and lines[7] == "rank 8: compiles (0 s), 3 of 3 done"
    assert shown.left() == 0


def test_a_terminal_has_one_line_that_counts(tmp_path: Path) -> None:
    now, stream = [0.0], io.StringIO()
    shown = progress(tmp_path, Terminal(stream), 2, now)
    assert "0/3 done" in shown.picture() and "importing MindFormers 0 s" in shown.picture()
    shown.reached(0, "compiling")
    shown.reached(8, "building the network")
    now[0] = 7.0
    assert shown.picture().endswith("rank 0 compiling 7 s  rank 8 building the network 7 s")
    with shown.ticking():
        pass
    assert stream.getvalue().count("\n") == 1
