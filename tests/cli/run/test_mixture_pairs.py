# SPDX-License-Identifier: Apache-2.0
"""Two processes over one data mixture, on both engines: the ids of one process, and a kill changes nothing after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.data.mixture.schedule import DomainSchedule
from mindformers_ext.jobs.run.mixture import open_mixture
from tests.helpers.cluster import free_port, launch_environment, wait_for
from tests.helpers.mixtures import NAMES, mixture_job
from tests.helpers.prune_jobs import continue_job, prune_job
from tests.helpers.tiny_run import BATCH, ROOT, command, config_of

pytestmark = pytest.mark.slow
TIMES = ("seconds", "tokens_per_second")
ENGINES = [
    pytest.param("pt", marks=pytest.mark.turn("killed runs")),
    pytest.param("ms", marks=pytest.mark.long("tests/cli/run/test_mixture_pairs.py does it on PyTorch")),
]
LAUNCHERS = {"pt": "torchrun_launcher.sh", "ms": "msrun_launcher.sh"}
WORDS = "--trainer own --use_parallel True --parallel.parallel_mode 0 --parallel.full_batch False --batch_size 2"


def started(job: Path, engine: str, output: str, *options: str) -> subprocess.Popen:
    """Two processes by the engine's launcher, in a session of their own."""
    words = ("--engine", engine, "--output_dir", output, "--callbacks.1.save_checkpoint_steps", "1")
    text = " ".join(command(job, *words, *WORDS.split(), *options)[1:])
    launcher = str(ROOT / "scripts" / LAUNCHERS[engine])
    with (job.parent / f"{output}.log").open("w") as log:
        return subprocess.Popen(
            ["bash", launcher, text, "2", str(free_port()), f"log_{output}", "True", "200"],
            cwd=job.parent,
            env=launch_environment() | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finished(job: Path, engine: str, output: str, *options: str) -> list[list[dict]]:
    """Metrics of both ranks, without times, of a run to its end."""
    process = started(job, engine, output, *options)
    assert process.wait(280) == 0, (job.parent / f"{output}.log").read_text()[-3000:]
    files = [job.parent / output / "metrics" / f"rank_{rank}.jsonl" for rank in (0, 1)]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[{k: v for k, v in row.items() if k not in TIMES} for row in of_rank] for of_rank in rows]


def killed_and_finished(job: Path, engine: str) -> list[list[dict]]:
    """The same of a run that is killed after some steps and resumed."""
    broken = started(job, engine, "broken")
    metrics = job.parent / "broken" / "metrics" / "rank_1.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, 200, "three steps")
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert metrics.read_bytes().count(b"\n") < 10
    return finished(job, engine, "broken", "--resume_training", "True")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_draw_as_one_and_go_on_where_they_were_killed(engine: str, tmp_path: Path) -> None:
    job = mixture_job(tmp_path)
    whole = finished(job, engine, "whole")
    assert whole[0] == whole[1] and len(whole[0]) == 10
    data = run_spec_from_yaml(config_of(job)).data
    assert data is not None and data.mixture is not None
    alone = DomainSchedule(open_mixture(data.mixture).state(data.seed, BATCH))
    for row in whole[0]:
        alone.draw()
        assert [row[f"rows.{name}"] for name in NAMES] == list(alone.state.used)
        if "domain_loss.web" in row and row["step"] < 10:
            after = whole[0][row["step"]]  # the next step's
            alone.move(np.array([after[f"proportion.{name}"] for name in NAMES]))
    assert killed_and_finished(job, engine) == whole


PRUNING = [
    pytest.param("pt", prune_job, marks=pytest.mark.turn("killed runs")),
    *(
        pytest.param(
            *case, marks=pytest.mark.long("tests/cli/run/test_mixture_pairs.py does it on PyTorch, for the first stage")
        )
        for case in (("pt", continue_job), ("ms", prune_job), ("ms", continue_job))
    ),
]


@pytest.mark.parametrize(("engine", "make_job"), PRUNING)
def test_pruning_and_what_follows_go_on_where_they_were_killed(
    engine: str, make_job: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Ids, proportions, sparsities and losses, and every number of the last checkpoint: masks, multipliers, moments."""
    job = make_job(tmp_path)
    whole = finished(job, engine, "whole")
    assert len(whole[0]) == 10 and ("lagrangian_loss" in whole[0][0]) == (make_job is prune_job)
    assert killed_and_finished(job, engine) == whole
    last = "checkpoint/rank_0/tiny_rank_0-1_10.ckpt"
    assert (tmp_path / "broken" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
