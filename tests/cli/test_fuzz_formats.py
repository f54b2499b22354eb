# SPDX-License-Identifier: Apache-2.0
"""Spoiled inputs of every format that is read from others: no traceback, bounded memory, bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fuzz_formats import FORMATS

COUNT, FEW = 60, 24  # of each format with --all, and without
ABOVE = 400 * 2**20  # bytes above what the process held before


@pytest.mark.slow
def test_spoiled_inputs_of_every_format(tmp_path: Path, repo_root: Path, pytestconfig: pytest.Config) -> None:
    count = COUNT if pytestconfig.getoption("everything") else FEW
    words = [sys.executable, "-m", "tests.helpers.fuzz_formats", str(tmp_path / "work"), str(count)]
    (tmp_path / "work").mkdir()
    done = subprocess.run(words, cwd=repo_root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{result['done']}\npeak {result['above'] / 1e6:.0f} MB above idle")
    assert not result["violations"], "\n".join(result["violations"])
    assert sum(result["done"].values()) == count * len(FORMATS)
    refused = {name: result["done"].get(f"{name}: refused", 0) for name in FORMATS}
    assert min(refused.values()) >= count // 6, refused  # the spoiling spoils
    read = {name: result["done"].get(f"{name}: read", 0) for name in ("merges", "mixtures", "jobs", "launches")}
    assert min(read.values()) >= count // 9, read  # and leaves some whole, read to their end
    assert result["above"] < ABOVE
