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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this machine")
def test_kernels_equal_their_twins() -> None:
    """In a process of its own: the interpreter is chosen while triton is imported."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    found = subprocess.run([sys.executable, str(ROOT / "tests" / "pt" / "triton_worker.py")], env=environment,
                           capture_output=True, text=True, timeout=280, check=False)  # fmt: skip
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert found.stdout.count("combine (") == 6 and "all kernels equal their twins" in found.stdout
