# SPDX-License-Identifier: Apache-2.0
"""Runs of our loop on PyTorch that stop and continue: with adapters, and from the slices of a cluster."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.jobs.run.checks import check_run
from mindformers_ext.jobs.train.train import train
from tests.helpers.sliced import cut, write_ranks, write_strategy
from tests.helpers.tiny_run import YAML, config_of, rows_of, token_rows, write_rows

PET = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ".*wq|.*wo|lm_head"}
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A YAML of ten steps, without a tokenizer; one thread, so that equal steps are equal to the last bit."""
    folder, threads = tmp_path_factory.mktemp("resume"), torch.get_num_threads()
    data = write_rows(folder / "train.mindrecord", token_rows())
    (folder / "job.yaml").write_text(YAML.replace("dataset_dir: ''", f"dataset_dir: {data}"), encoding="utf-8")
    torch.set_num_threads(1)
    yield folder / "job.yaml"
    torch.set_num_threads(threads)


def run(job: Path, output: str, pet: dict[str, Any] | None = None, *options: str) -> tuple[list[dict], dict]:
    """Metrics, without times, and the last checkpoint of a run."""
    folder = job.parent / output
    words = ("engine=pt", "runner_config.epochs=1", "callbacks.1.save_checkpoint_steps=6", f"output_dir={folder}")
    config = config_of(job, *words, *options)
    config["model"]["model_config"]["pet_config"] = pet
    checked = check_run(config, "test")
    train(checked.run, checked.config, checked.build.network, checked.notes)
    with_state = CkptFile(max((folder / "checkpoint" / "rank_0").glob("*-1_10.ckpt")))
    state = {name: with_state.read(name) for name in with_state.infos}
    with_state.close()
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(folder)], state


def stopped(job: Path, whole: str, copy: str) -> Path:
    """A copy of the run ``whole`` as if it had been killed behind its sixth step's checkpoint."""
    folder = job.parent / copy
    shutil.copytree(job.parent / whole, folder)
    (folder / "checkpoint" / "rank_0" / "tiny_rank_0-1_10.ckpt").unlink()
    return folder


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return list(left) == list(right) and all(left[name].tobytes() == right[name].tobytes() for name in left)


@pytest.fixture(scope="module")
def whole(job: Path) -> tuple[list[dict], dict]:
    return run(job, "whole")


def test_adapters_continue_as_if_they_had_not_stopped(job: Path, whole: tuple) -> None:
    base = f"load_checkpoint={job.parent / 'whole' / 'checkpoint'}"
    rows, state = run(job, "adapted", PET, base)
    assert len(rows) == 10 and not any(name == "lm_head.weight" for name in state)
    for number, named in enumerate((base, "load_checkpoint=")):  # the command that began the run, and a shorter one
        stopped(job, "adapted", f"again{number}")
        again, last = run(job, f"again{number}", PET, named, "resume_training=True")
        assert again == rows and equal(last, state)


def test_adapters_on_first_weights_continue_too(job: Path) -> None:
    rows, state = run(job, "first", PET)
    stopped(job, "first", "first_again")
    again, last = run(job, "first_again", PET, "resume_training=True")
    assert again == rows and equal(last, state)


def test_the_slices_of_a_cluster_are_continued(job: Path, whole: tuple) -> None:
    """Two stages of two devices: weights, moments and counters put together are the run that had one device."""
    rows, state = whole
    file = CkptFile(job.parent / "whole" / "checkpoint" / "rank_0" / "tiny_rank_0-1_6.ckpt")
    held = {name: file.read(name) for name in file.infos}
    file.close()
    stages = [dict[str, Any](), dict[str, Any]()]
    for name, array in held.items():
        if name.removeprefix("adam_m.").removeprefix("adam_v.").startswith(("model.", "lm_head.")):
            first = "layers.0" in name or "tok_embeddings" in name
            row = {"matrix": [2], "tensor_map": [0 if array.ndim > 1 else -1] + [-1] * (array.ndim - 1)}
            stages[0 if first else 1][name] = row
    folder = job.parent / "cluster"
    for stage, layouts in enumerate(stages):
        write_strategy(folder / "strategy" / f"ckpt_strategy_rank_{2 * stage}.ckpt", layouts, stage)
    counters = {name: array for name, array in held.items() if name not in stages[0] | stages[1]}
    ranks = cut(read_strategy(folder / "strategy"), held, counters)
    write_ranks(folder / "checkpoint", ranks, name="tiny_rank_{}-1_6")
    found, last = run(job, "on_one", None, f"load_checkpoint={folder / 'checkpoint'}", "resume_training=True")
    assert found == rows[6:] and equal(last, state)
