# SPDX-License-Identifier: Apache-2.0
"""The four commands of research/llama_moe/README.md, which are the seed's, with a small model and few processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.cli.docs.test_readme import commands
from tests.helpers.tiny_llama import LAYERS, WIDTH, make_llama, write_texts

FILES = {f"layers.{layer}.mlp.gate_proj.weight" for layer in range(LAYERS)}
SMALL = {"--nproc_per_node=8": "--nproc_per_node=2", "--data_use_percent 0.01": "--data_use_percent 1 --block_size 16"}


@pytest.mark.slow
def test_the_seeds_commands_leave_the_seeds_files_and_a_mixture(repo_root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_llama(data / "llama_7B")
    write_texts(data / "llama_data")
    for name in ("research", "mindformers_ext"):
        (tmp_path / name).symlink_to(repo_root / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    asked = [
        command
        for command in commands((repo_root / "research/llama_moe/README.md").read_text("utf-8"))
        if re.search(r"research/llama_moe/\w+\.py", command)
    ]
    assert len(asked) == 4
    for command in asked:
        for long, short in SMALL.items():
            command = command.replace(long, short)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    experts = data / "experts"
    labels = torch.load(experts / "llama_7B-8Expert-Split-Clustering" / "layers.0.mlp.gate_proj.weight")
    assert sorted(labels) == sorted(list(range(8)) * (WIDTH // 8))
    names = ("hidden_inputs", "hidden_gate_outputs")
    for name in names:
        ranks = {path.name.split("_")[0] for path in (experts / "llama_7B-Hidden-Features" / name / "layer0").iterdir()}
        assert ranks == {"0", "1"}
    for folder in ("llama_7B-8Expert-Split-Clustering", "llama_7B-8Expert-Select-MLP"):
        assert {path.name for path in (experts / folder).glob("*.weight")} == FILES
    with safe_open(data / "llama_7B-MoE" / "model.safetensors", "pt") as file:
        assert "model.layers.2.mlp.calculator.experts.weight_down.7" in file.keys()
