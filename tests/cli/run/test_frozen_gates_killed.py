# SPDX-License-Identifier: Apache-2.0
"""A run with ``freeze_gate`` that is killed and goes on: as if it had not been, and its gates as they were given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mindformers_ext.cli.mfext import main
from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.llama_moe_v2_models import random_tensors, v2_words, write_folder
from tests.helpers.tiny_llama import write_tokenizer
from tests.helpers.tiny_run import ROOT, environment, rows_of, token_rows, write_rows

STEPS, ROWS, SEQ = 80, 4, 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
WORDS = v2_words("attention, residual", **SIZES)
TENSORS = random_tensors(WORDS)
SETTINGS = environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    """A residual LLaMA-MoE v2 whose heads are experts, and rows; one thread, so that equal steps are equal bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokenizer(write_folder(tmp_path / "model", WORDS, TENSORS))
    write_rows(tmp_path / "train.mindrecord", token_rows(SEQ + 1, STEPS * ROWS))
    yield tmp_path
    torch.set_num_threads(threads)


def words(job: Path, engine: str, output: str, *more: object) -> list[str]:
    given = ["train", job / "model", "--data", job / "train.mindrecord", "--engine", engine, "--trainer", "own"]
    given += ["--batch_size", ROWS, "--runner_config.freeze_gate", True, "--callbacks.1.save_checkpoint_steps", 10]
    return [*map(str, (*given, "--output_dir", job / output, "--save_yaml", job / f"{output}.yaml", *more))]


def started(job: Path, engine: str, output: str, *more: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mindformers_ext", *words(job, engine, output, *more)]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=job, env=SETTINGS, stdout=nothing, stderr=nothing)


def weights(job: Path, output: str) -> dict[str, np.ndarray]:
    """Of the last checkpoint, with the optimizer's state."""
    (last,) = (job / output / "checkpoint" / "rank_0").glob(f"*_{STEPS}.ckpt")
    file = CkptFile(last)
    found = {name: file.read(name) for name in file.infos}
    file.close()
    return found


def assert_as_if_not_killed(job: Path, engine: str, run: Callable[[list[str]], int]) -> None:
    """``run`` carries a command out, in this process or another."""
    assert run(words(job, engine, "whole")) == 0
    process = started(job, engine, "broken")
    metrics, deadline = job / "broken" / "metrics" / "rank_0.jsonl", time.time() + 200
    while time.time() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 13):
        time.sleep(0.01)
    assert process.poll() is None, "it has ended before it could be killed: give it more steps"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resume = ("--resume_training", True, "--load_checkpoint", job / "broken" / "checkpoint")
    assert run(words(job, engine, "broken", *resume)) == 0
    whole, resumed = weights(job, "whole"), weights(job, "broken")
    assert whole.keys() == resumed.keys()
    different = [name for name, array in whole.items() if not np.array_equal(array, resumed[name])]
    assert not different, different
    timeless = [[(row["loss"], row["global_norm"]) for row in rows_of(job / name)] for name in ("whole", "broken")]
    assert len(timeless[0]) == STEPS and timeless[0] == timeless[1]
    start = to_mindspore(TENSORS, model_spec_from_hf(WORDS))
    same = {name for name, array in start.items() if np.array_equal(array, resumed[name])}
    assert len(same) == 2 and same == {name for name in start if ".router." in name}  # of heads and of experts


def test_frozen_gates_of_a_killed_run_on_pytorch(job: Path) -> None:
    assert_as_if_not_killed(job, "pt", main)


@pytest.mark.slow
@pytest.mark.long("the same of PyTorch, and MindSpore's frozen gates in tests/parity/test_packed_rows.py")
def test_frozen_gates_of_a_killed_run_on_mindspore(job: Path) -> None:
    def run(given: list[str]) -> int:
        return subprocess.run(
            [sys.executable, "-m", "mindformers_ext", *given], cwd=job, env=SETTINGS, check=False
        ).returncode

    assert_as_if_not_killed(job, "ms", run)
