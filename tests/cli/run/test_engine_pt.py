# SPDX-License-Identifier: Apache-2.0
"""``--engine pt``: what it refuses is named before anything is built; several processes; its benchmarks run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT, command, environment, make_job, rows_of, run_job

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device_target", "Ascend", "--engine", "pt"), "--engine pt with device_target Ascend: PyTorch runs"),
        (("--device_target", "GPU", "--engine", "ms"), "MindSpore has no kernels for today's GPUs"),
        (("--engine", "pt", "--do_eval", "True"), "do_eval=True: the PyTorch engine does not build this"),
        (("--engine", "pt", "--optimizer.type", "Muon"), "optimizer.type='Muon' is unknown"),
        (("--engine", "pt", "--train_dataset.repeat", "3"), "repeat=3 is not built in the PyTorch engine"),
        (("--engine", "pt", "--load_checkpoint", "nowhere"), "load_checkpoint nowhere does not exist"),
        (("--engine", "pt", "--model.model_config.seq_length", "16"), "seq_length=16 needs 17"),
    ],
)
def test_what_cannot_be_done_is_named(job: Path, options: tuple, message: str) -> None:
    found = run_job(job, *options, "--output_dir", job.parent / "wrong", cwd=job.parent)
    assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert not (job.parent / "wrong" / "checkpoint").exists()


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_a_gpu_that_is_not_there(job: Path) -> None:
    found = run_job(job, "--device_target", "GPU", cwd=job.parent)
    assert found.returncode == 2 and "no CUDA driver: run with --device_target CPU" in found.stderr


def test_the_launcher_reads_the_forms_of_msrun(job: Path) -> None:
    script = ["bash", str(ROOT / "scripts" / "torchrun_launcher.sh")]
    dry = dict(environment(), TORCHRUN_DRY_RUN="1")
    words = ["run_mindformer.py --config 'my job.yaml'", "16", "8", "10.0.0.1", "8118", "1", "logs", "True", "90"]
    found = subprocess.run([*script, *words], env=dry, capture_output=True, text=True, check=False)
    assert "-m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=10.0.0.1" in found.stdout
    assert "timeout=90" in found.stdout and "'my job.yaml'" in found.stdout
    wrong = subprocess.run([*script, words[0], "2", "x"], env=dry, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and "bash scripts/torchrun_launcher.sh COMMAND WORKERS" in wrong.stderr
    wrong = subprocess.run([*script, words[0], "none"], env=dry, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "torchrun_launcher.sh: 2 problems\n  - WORKERS='none'" in wrong.stderr


SIZES = (
    "--use_parallel",
    "True",
    "--parallel_config.data_parallel",
    "2",
    "--parallel_config.expert_parallel",
    "2",
    "--parallel.enable_alltoall",
    "True",
    "--parallel_config.pipeline_stage",
    "1",
    "--parallel_config.micro_batch_num",
    "1",
    "--batch_size",
    "2",
    "--train_dataset.batch_size",
    "2",
    "--callbacks.1.save_checkpoint_steps",
    "4",
)


def launch(job: Path, *options: object) -> subprocess.Popen:
    """Two processes by the launcher, in a session of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = " ".join(command(job, "--engine", "pt", *SIZES, *options)[1:])
    words = ["bash", str(ROOT / "scripts" / "torchrun_launcher.sh"), text, "2", str(port), "logs", "True", "100"]
    return subprocess.Popen(
        words,
        cwd=job.parent,
        env=environment() | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_of_two_processes_is_one_line_and_130(tmp_path: Path) -> None:
    """What a command does when it is interrupted, under torchrun and our launcher; no network is needed for it."""
    (tmp_path / "work.py").write_text(
        "import argparse, os, sys, time\n"
        "from mindformers_ext.cli.outcome import exit_code\n"
        "print('at work', file=sys.stderr, flush=True)\n"
        "open(f'ready{os.environ[\"RANK\"]}', 'w').close()\n"
        "sys.exit(exit_code(lambda _: time.sleep(100), argparse.Namespace(), unwinds=False))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "torchrun_launcher.sh"), "work.py", "2", str(port), "logs", "True", "100"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 100
    while time.time() < deadline and len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text, text
    said = [line for line in text.splitlines()[2:] if line not in ("at work", "interrupted")]  # the first worker's own
    assert said == ["stopped: all workers of this machine were ended"] and text.count("interrupted") <= 1, text


@pytest.mark.slow
@pytest.mark.turn("killed runs")
def test_two_processes_killed_and_resumed(job: Path) -> None:
    """FSDP2 and expert parallel from one YAML; the resumed run equals the one that was left alone."""
    whole = launch(job, "--output_dir", "whole")
    text = whole.communicate(timeout=280)[0]
    assert whole.returncode == 0, text[-3000:]
    broken = launch(job, "--output_dir", "broken")
    metrics, deadline = job.parent / "broken" / "metrics" / "rank_1.jsonl", time.time() + 200
    while time.time() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        time.sleep(0.05)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    again = launch(job, "--output_dir", "broken", "--resume_training", "True")
    text = again.communicate(timeout=280)[0]
    assert again.returncode == 0 and "resuming from" in text, text[-3000:]
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
            for row in rows_of(job.parent / name)
        ]
        for name in ("whole", "broken")
    ]
    assert len(timeless[0]) == 20 and timeless[0] == timeless[1]


@pytest.mark.slow
@pytest.mark.turn("bench")
def test_benchmarks_run_at_toy_sizes() -> None:
    words = [sys.executable, "tools/bench/gpu.py", "--shapes", "toy", "--tokens", "1", "16", "--reps", "2"]
    found = subprocess.run(
        words, cwd=ROOT, env=environment() | ONE_THREAD, capture_output=True, text=True, timeout=250, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.search(r"roofs: read \d+ GB/s, copy \d+ GB/s, product", found.stdout)
    errors = [float(text) for text in re.findall(r"error (\d\S+)", found.stdout)]
    assert len(errors) >= 18 and max(errors) < 1e-2
    words = [sys.executable, "tools/bench/moe_layer.py", "--engine", "pt", "--tokens", "16", "--rounds", "1"]
    found = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "checked 16 of 16 tokens equal" in found.stdout
