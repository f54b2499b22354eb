# SPDX-License-Identifier: Apache-2.0
"""A pruning run of two processes (FSDP2 over gloo) equals that of one with the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.core.config.file import dump_yaml
from tests.helpers.tiny_run import ROOT, config_of, rows_of, token_rows, write_rows
from tests.pt.test_sharded import launched


def config(repo_root: Path, place: Path, name: str, *options: str) -> Path:
    found: dict[str, Any] = config_of(
        repo_root / "configs" / "tiny" / "llama_prune.yaml",
        "engine=pt",
        f"output_dir={place / name}",
        f"train_dataset.data_loader.dataset_dir={place / 'rows.mindrecord'}",
        "model.model_config.num_layers=2",
        "model.model_config.l0_module.target_model.n_layers=1",
        "model.model_config.l0_module.lagrangian_warmup_steps=2",
        *options,
    )
    path = place / f"{name}.yaml"
    path.write_text(dump_yaml(found), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.turn("pruning trainers")
def test_two_processes_equal_one(repo_root: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.mindrecord", token_rows(width=129, rows=40, high=1990))
    one = config(repo_root, tmp_path, "one", "runner_config.batch_size=8")
    words = ("use_parallel=True", "parallel_config.data_parallel=2", "parallel.parallel_mode=1")
    two = config(repo_root, tmp_path, "two", "runner_config.batch_size=4", *words)
    launched([ROOT / "run_mindformer.py", "--config", one], size=1)
    launched([ROOT / "run_mindformer.py", "--config", two], size=2)
    alone, together = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(alone) == len(together) == 5
    for mine, theirs in zip(alone, together, strict=True):
        for name in ("loss", "lm_loss", "lagrangian_loss", "global_norm", "expected_hidden_sparsity"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.turn("pruning trainers")
def test_a_killed_run_goes_on_to_the_same_bits(repo_root: Path, tmp_path: Path) -> None:
    """Killed twice, at whichever moment that is; over domains the same is tests/pt/test_prune_run.py without a kill."""
    write_rows(tmp_path / "rows.mindrecord", token_rows(width=129, rows=96, high=1990))
    words = ("runner_config.batch_size=8", "callbacks.1.save_checkpoint_steps=1", "callbacks.1.keep_checkpoint_max=0")
    whole = config(repo_root, tmp_path, "whole", *words)
    launched([ROOT / "run_mindformer.py", "--config", whole], size=1)
    killed = config(repo_root, tmp_path, "killed", *words)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    checkpoints = tmp_path / "killed" / "checkpoint" / "rank_0"
    for step, more in ((3, ()), (7, ("--resume_training", "True"))):
        command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(killed), *more]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            until = time.monotonic() + 120
            while not (checkpoints / f"prune_rank_0-1_{step}.ckpt").exists() and time.monotonic() < until:
                time.sleep(0.005)
            process.kill()
        assert (checkpoints / f"prune_rank_0-1_{step}.ckpt").exists()
    launched([ROOT / "run_mindformer.py", "--config", killed, "--resume_training", "True"], size=1)
    last = "checkpoint/rank_0/prune_rank_0-1_12.ckpt"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
