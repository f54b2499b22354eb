# SPDX-License-Identifier: Apache-2.0
"""The graph of a dry run's fork is, line for line, the one that a job of msrun compiles.

The job is started by its launcher, with a process for every rank, and runs to its last step, on the device that CANN's
stand-ins simulate: a cut graph needs the Ascend compiler, and MindSpore simulates no cluster of CPUs ("Dryrun is not
supported on CPU device for a distributed job"). Forks, synthetic rows, weights that are left out and the end before
the first step are what a dry run has of its own, and what could show.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.formats.graph_text import read_graph
from mindformers_ext.jobs.dryrun.facts import traffic_facts
from mindformers_ext.jobs.dryrun.ranks import GRAPHS, PASSES
from mindformers_ext.jobs.dryrun.stubs import ensure_stubs
from tests.helpers.cluster import free_port, launch
from tests.helpers.tiny_run import ROOT, environment, make_job

LONG = pytest.mark.long("tests/cli/dryrun/test_dryrun.py compares what ranks hold and send with the arithmetic")
# processes, ranks compared, `parallel`, `parallel_config`, whether data goes through the device's queue
PIPELINE = {"data_parallel": 2, "expert_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}
JOBS: dict[str, tuple[int, tuple[int, ...], dict[str, Any], dict[str, Any], bool]] = {
    "pipeline": (4, (0, 3), {"parallel_mode": 1, "enable_alltoall": True}, PIPELINE, False),
    "sunk data": (4, (0, 3), {"parallel_mode": 1, "enable_alltoall": True}, PIPELINE, True),
    "data parallel": (2, (0, 1), {"parallel_mode": 0}, {}, False),
}


def written(folder: Path, parallel: dict[str, Any], cut: dict[str, Any], sinks: bool) -> Path:
    """The tiny job for Ascend, whose steps are counted by the file and not by its rows: a dry run has one step's."""
    path = make_job(folder)
    words = load_yaml(path)
    words["use_parallel"] = True
    words["context"] |= {"device_target": "Ascend", "device_id": 0}
    words["runner_config"] |= {"sink_mode": sinks, "epochs": 1}
    words["lr_schedule"]["total_steps"] = 20
    words["model"]["model_config"]["compute_dtype"] = "bfloat16"
    words["callbacks"] = [{"type": "MFLossMonitor"}]
    words |= {"parallel": parallel, "parallel_config": cut}
    path.write_text(yaml.safe_dump(words), encoding="utf-8")
    return path


def lines(path: Path) -> list[str]:
    """A graph's text without what differs from process to process: addresses, the number of a compilation, and the
    order in which names of one value are joined, which follows Python's hashes."""
    text = re.sub(r"0x[0-9a-f]+|(?m:^compile_phase: .*$)", "", path.read_text(encoding="utf-8"))
    text = re.sub(r"\w+(?:\$\w+)+", lambda found: "$".join(sorted(found[0].split("$"))), text)
    return text.splitlines()


def last_graph(folder: Path) -> Path:
    """The last of the front end's graphs."""
    (found,) = folder.rglob("*_validate_*.ir")
    return found


@pytest.mark.slow
@pytest.mark.dryrun
@LONG
@pytest.mark.parametrize("name", JOBS)
def test_a_fork_compiles_what_a_started_job_compiles(name: str, tmp_path: Path) -> None:
    processes, ranks, parallel, cut, sinks = JOBS[name]
    path = written(tmp_path, parallel, cut, sinks)
    words = [sys.executable, str(ROOT / "tools" / "dryrun.py"), "--config", str(path), "--worker_num", str(processes)]
    words += ["--ranks", ",".join(map(str, ranks)), "--out", str(tmp_path / "dry"), "--keep_graphs", "True"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    base = environment()
    simulated = ensure_stubs().environment(0, processes, base)
    variables = {key: value for key, value in simulated.items() if base.get(key) != value and key != "RANK_ID"}
    variables |= {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": PASSES}
    variables |= {"MS_DEV_SAVE_GRAPHS_PATH": str(tmp_path / "real"), "OMP_NUM_THREADS": "1"}
    command = f"run_mindformer.py --config {path} --output_dir {tmp_path / 'out'}"
    text = launch(command, processes, free_port(), tmp_path / "log", "True", 300, cwd=tmp_path, **variables)
    assert text.startswith("0\n") and "step 2/" in text, text[-3000:]

    pairs = [
        (
            last_graph(tmp_path / "dry" / "ranks" / f"rank_{rank}" / GRAPHS),
            last_graph(tmp_path / "real" / f"rank_{rank}"),
        )
        for rank in ranks
    ]
    for fork, real in pairs:
        if sinks:  # rows come from a queue, and nothing else is another
            ours, theirs = read_graph(fork), read_graph(real)
            assert theirs.operators - ours.operators == {"GetNext": 1, "TupleGetItem": 1}
            assert not ours.operators - theirs.operators and ours.matmul_flops == theirs.matmul_flops > 0
            assert traffic_facts(ours.collectives) == traffic_facts(theirs.collectives) != ()
            rows = [key for key in ours.parameters if key not in theirs.parameters]
            assert len(rows) == 1 and {**theirs.parameters, rows[0]: ours.parameters[rows[0]]} == ours.parameters
        else:
            assert lines(fork) == lines(real) and len(lines(fork)) > 1000
    if processes > 2:  # the comparison tells stages apart
        assert lines(pairs[0][0]) != lines(pairs[1][0])
