# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels equal their twins in plain torch: in Triton's interpreter on a CPU, compiled where a GPU is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed on this machine"
)


def run(worker: str, **environment: str) -> str:
    """What the worker printed, in a process of its own: the interpreter is chosen while triton is imported."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment)
    found = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pt" / worker)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    return found.stdout


INTERPRETER = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}


def test_kernels_equal_their_twins() -> None:
    found = run("triton_worker.py", **INTERPRETER)
    assert found.count("combine (") == 6 and "all kernels equal their twins" in found


@pytest.mark.slow
@pytest.mark.turn("triton")
def test_experts_equal_their_twins() -> None:
    found = run("triton_experts_worker.py", **INTERPRETER)
    assert found.count("experts Case(") == 11 and "all experts equal their twins" in found


@pytest.mark.slow
@pytest.mark.turn("triton")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    found = run("triton_compile_worker.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert found.count("compiled _") == 15 and "all kernels compile" in found
