# SPDX-License-Identifier: Apache-2.0
"""scripts/quickstart.sh, shortened: the whole chain from text to a trained model that transformers agrees with."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest


def started(repo_root: Path, *arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/quickstart.sh", *arguments]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "unknown option '--step'; known are --steps, --output"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "many"], "--steps many is not a whole number above 0"),
    ],
)
def test_wrong_options_end_with_2_before_anything_runs(repo_root: Path, arguments: list[str], message: str) -> None:
    result = started(repo_root, *arguments, timeout=20)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_help_names_the_options(repo_root: Path) -> None:
    result = started(repo_root, "--help", timeout=20)
    assert result.returncode == 0
    assert "bash scripts/quickstart.sh [--steps N] [--output DIR]" in result.stdout


@pytest.mark.slow
def test_the_whole_chain(repo_root: Path, quickstart: tuple[Path, str]) -> None:
    output, printed = quickstart
    parity = re.fullmatch(r"max \|logits difference\| = (\S+) <= 0\.0001", printed.strip().split("\n")[-1])
    assert parity and float(parity[1]) <= 1e-4
    page = (output / "report.md").read_text()
    assert "| steps | 30 |" in page and "passed" in page and parity[0] in page
    for name in ("loss.png", "expert_load.png"):
        assert (output / name).stat().st_size > 20_000
    answer = page.split("## What the trained model writes")[1].strip()
    assert answer.startswith("This module") and len(answer) > len("This module") + 5
    commands = [line for line in printed.split("\n") if line.startswith("+ ")]
    assert any("run_mindformer.py --config configs/tiny/mixtral_pretrain.yaml" in line for line in commands)
    assert not [name for name in os.listdir(repo_root) if name in ("rank_0", "kernel_meta")]


def test_a_folder_of_somebody_else_is_left_alone(repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    result = started(repo_root, "--output", str(tmp_path), timeout=20)
    assert result.returncode == 2
    assert "was not made by this script" in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep me"
