# SPDX-License-Identifier: Apache-2.0
"""``--trainer own`` on MindSpore, where MindFormers cannot be imported, beside MindFormers' road: the same bits."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.formats.ms_ckpt import CkptFile
from tests.helpers.tiny_run import ROOT, environment, make_job, rows_of, run_job

STEPS, EPOCHS, EVERY = 50, 5, 20
LAST = "checkpoint/rank_0/tiny_rank_0-5_10.ckpt"
WITHOUT_MINDFORMERS = """
import sys
sys.modules["mindformers"] = None  # importing it fails
from mindformers_ext.cli.run_mindformer import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose rows are shuffled anew in each of its five epochs."""
    return make_job(tmp_path_factory.mktemp("own"))


def own(job: Path, output: str, *words: object, epochs: int = EPOCHS) -> subprocess.Popen[str]:
    """Our loop in a process of its own."""
    options = ("--config", job, "--output_dir", output, "--epochs", epochs, "--trainer", "own", *words)
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_MINDFORMERS, *map(str, options)],
        cwd=job.parent,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What the process has said, once it has ended well."""
    text = process.communicate(timeout=280)[1]
    assert process.returncode == 0, text[-3000:]
    return text


def timeless(output: Path) -> list[dict]:
    """The metrics without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows_of(output)]


@pytest.fixture(scope="module")
def whole(job: Path) -> Path:
    text = finished(own(job, "whole", "--callbacks.1.save_checkpoint_steps", EVERY))
    assert "--trainer own writes no TensorBoard events" in text and "tokens/s  0:00:" in text
    assert "compiling the training step: done in " in text and len(text.splitlines()) <= 40
    return job.parent / "whole"


@pytest.mark.skipif(importlib.util.find_spec("mindformers") is None, reason="MindFormers, the judge, is not installed")
@pytest.mark.slow
def test_fifty_steps_and_the_last_checkpoint_equal_mindformers_road_to_the_last_bit(job: Path, whole: Path) -> None:
    found = run_job(
        job,
        "--output_dir",
        "mindformers",
        "--epochs",
        EPOCHS,
        "--callbacks.1.save_checkpoint_steps",
        EVERY,
        cwd=job.parent,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    theirs = job.parent / "mindformers"
    assert len(timeless(whole)) == STEPS and timeless(whole) == timeless(theirs)
    assert sorted(path.name for path in (whole / LAST).parent.glob("*.ckpt")) == sorted(
        path.name for path in (theirs / LAST).parent.glob("*.ckpt")
    )
    first, second = CkptFile(whole / LAST), CkptFile(theirs / LAST)
    assert list(first.infos) == list(second.infos)
    for name, info in first.infos.items():
        assert (info.shape, info.dtype) == (second.infos[name].shape, second.infos[name].dtype), name
        np.testing.assert_array_equal(first.read(name), second.read(name), err_msg=name)


@pytest.mark.slow
@pytest.mark.turn("killed runs")
def test_killed_and_resumed_is_as_if_it_had_not_been(job: Path, whole: Path) -> None:
    process = own(job, "killed", "--callbacks.1.save_checkpoint_steps", 7)
    metrics, deadline = job.parent / "killed" / "metrics" / "rank_0.jsonl", time.time() + 250
    while time.time() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 23):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    text = finished(own(job, "killed", "--resume_training", "True"))
    assert "resuming from" in text and "Resumed from" in text
    assert timeless(job.parent / "killed") == timeless(whole)


@pytest.mark.slow
@pytest.mark.long("the same steps as one graph; tests/parity/test_trainers.py, steps in both modes")
def test_operator_by_operator_the_losses_are_the_same_to_a_millionth(job: Path, whole: Path) -> None:
    """The first epoch of the same run: all of it takes minutes in this mode."""
    finished(own(job, "pynative", "--mode", 1, "--lr_schedule.total_steps", STEPS, epochs=1))
    ours, graph = timeless(job.parent / "pynative"), timeless(whole)[: STEPS // EPOCHS]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in graph], rtol=1e-6)
    assert [r["learning_rate"] for r in ours] == [r["learning_rate"] for r in graph]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "pt", "--trainer", "mindformers"), "--trainer mindformers with the PyTorch engine"),
        (("--trainer", "own", "--do_eval", "True"), "do_eval=True: --trainer own does not build this"),
        (("--trainer", "own", "--train_dataset.repeat", "3"), "repeat=3 is not built in --trainer own"),
    ],
)
def test_what_our_loop_does_not_do_is_named(job: Path, words: tuple, message: str) -> None:
    found = run_job(job, *words, "--output_dir", "wrong", cwd=job.parent)
    assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert not (job.parent / "wrong" / "checkpoint").exists()
