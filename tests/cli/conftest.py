# SPDX-License-Identifier: Apache-2.0
"""One run of the quickstart, which two files look at: tests/conftest.py gives them one scope."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def quickstart(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole chain, shortened: its output folder and what it printed."""
    if not (repo_root / ".venv" / ".setup_done").is_file():
        pytest.skip("needs .venv made by scripts/setup_env.sh; the script would install packages")
    output = tmp_path_factory.mktemp("quickstart") / "run"
    words = ["--steps", "30", "--max_bytes", "500000", "--max_loss_ratio", "0.97", "--output", str(output)]
    command = ["bash", "scripts/quickstart.sh", *words]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return output, result.stdout
