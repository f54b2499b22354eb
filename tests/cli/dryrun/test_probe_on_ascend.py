# SPDX-License-Identifier: Apache-2.0
"""The layer probe compiles for Ascend, forward and backward, with fused kernels in bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.jobs.dryrun.stubs import ensure_stubs


@pytest.mark.slow
@pytest.mark.dryrun
def test_layer_and_head_compile_both_ways(repo_root: Path) -> None:
    environment = ensure_stubs().environment(0, 1, os.environ)
    command = [sys.executable, "-m", "tests.helpers.probe_on_ascend", "bfloat16"]
    done = subprocess.run(
        command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "compiled for Ascend" in done.stdout, done.stderr[-2000:]
