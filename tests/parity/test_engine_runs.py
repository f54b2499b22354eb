# SPDX-License-Identifier: Apache-2.0
"""One YAML, one seed, MindSpore and PyTorch: the same loss curve, checkpoints that either continues, the same text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_run import command, environment, make_job, rows_of

EPOCHS, STEPS = 10, 100
pytestmark = pytest.mark.slow


def run(job: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The command on one thread, so that two runs of PyTorch are equal to the last bit."""
    epochs = () if "--epochs" in arguments else ("--epochs", EPOCHS)
    found = subprocess.run(
        command(job, "--output_dir", output, *epochs, *arguments),
        cwd=job.parent,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return make_job(folder)


@pytest.fixture(scope="module")
def mindspore(job: Path) -> Path:
    output = job.parent / "ms"
    run(job, output, "--callbacks.1.save_checkpoint_steps", 50)
    return output


@pytest.fixture(scope="module")
def pytorch(job: Path) -> Path:
    output = job.parent / "pt"
    run(job, output, "--engine", "pt", "--callbacks.1.save_checkpoint_steps", 50)
    return output


def test_the_same_curve(mindspore: Path, pytorch: Path) -> None:
    """From the seed alone: the same initial weights, the same rows, the same steps."""
    theirs, ours = rows_of(mindspore), rows_of(pytorch)
    assert len(theirs) == len(ours) == STEPS
    names = ("loss", "lm_loss", "aux_loss", "global_norm", "learning_rate", "loss_scale")
    worst = {
        name: max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-12) for a, b in zip(theirs, ours, strict=True))
        for name in names
    }
    print(f"\nrelative differences over {STEPS} steps: {worst}", end="")
    assert worst["loss"] <= 1e-3 and worst["lm_loss"] <= 1e-3 and worst["aux_loss"] <= 1e-3
    assert worst["learning_rate"] <= 1e-5 and worst["loss_scale"] == 0
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]
    assert theirs[0]["expert_load"] == ours[0]["expert_load"]


@pytest.mark.turn("same figures")
def test_the_same_curve_of_other_options(job: Path) -> None:
    """The other optimizer, accumulated gradients, sigmoid gates of limited groups, a bias that follows the load; and a
    Qwen2-MoE: a dense layer, biases, a gated shared expert."""
    text = job.read_text(encoding="utf-8")
    for old, new in {
        "enable_sdrop: True": "enable_sdrop: False, use_gating_sigmoid: True, balance_via_topk_bias: True, "
        "topk_bias_update_rate: 0.01, topk_method: noaux_tc, n_group: 2, topk_group: 1, z_loss_factor: 0.01",
        "type: AdamW, betas: [0.9, 0.95], eps: 1.0e-8": "type: FP32StateAdamWeightDecay, beta2: 0.95, eps: 1.0e-6",
        "- {type: ObsMonitor}\nmetric": "- {type: TopkBiasBalanceCallback}\nmetric",
        "batch_size: 4": "batch_size: 2",
        "type: LlamaConfig,": "type: Qwen2MoeConfig, moe_intermediate_size: 24, shared_expert_intermediate_size: 40, "
        "qkv_has_bias: True, dense_layers: [1],",
        "type: LlamaForCausalLM": "type: Qwen2MoeForCausalLM",
        "num_layers: 2": "num_layers: 3",
    }.items():
        assert old in text
        text = text.replace(old, new)
    other = job.with_name("other.yaml")
    other.write_text(text, encoding="utf-8")
    losses = {}
    for engine in ("ms", "pt"):
        output = job.parent / f"other_{engine}"
        run(other, output, "--engine", engine, "--epochs", 2, "--gradient_accumulation_steps", 2)
        losses[engine] = [row["loss"] for row in rows_of(output)]
    assert len(losses["ms"]) == 20
    np.testing.assert_allclose(losses["pt"], losses["ms"], rtol=1e-3)


def test_pytorch_continues_a_mindspore_run(job: Path, mindspore: Path) -> None:
    output = job.parent / "continued"
    shutil.copytree(mindspore / "checkpoint", output / "checkpoint")
    for path in (output / "checkpoint" / "rank_0").glob("*-10_10.ckpt"):
        path.unlink()
    run(job, output, "--engine", "pt", "--resume_training", True)
    ours, theirs = rows_of(output), rows_of(mindspore)[50:]
    assert [row["step"] for row in ours] == list(range(51, 101))
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-3)


def test_mindspore_reads_a_pytorch_checkpoint_and_both_write_the_same_text(job: Path, pytorch: Path) -> None:
    texts = {}
    for engine in ("ms", "pt"):
        output = job.parent / f"text_{engine}"
        run(
            job,
            output,
            "--run_mode",
            "predict",
            "--load_checkpoint",
            pytorch / "checkpoint",
            "--engine",
            engine,
            "--predict_data",
            "def load",
            "The",
            "import",
            "--max_new_tokens",
            20,
        )
        texts[engine] = (output / "sample.txt").read_text(encoding="utf-8")
    assert texts["ms"] == texts["pt"] and len(texts["pt"]) > 30
