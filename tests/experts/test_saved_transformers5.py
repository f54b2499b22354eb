# SPDX-License-Identifier: Apache-2.0
"""The tests of the saved model with transformers 5, which this environment does not have (MindFormers wants 4.57.1).

TRANSFORMERS5_PYTHON names an interpreter that has it beside torch and pytest; without it this is skipped:

    python -m venv five && five/bin/pip install torch==2.13.0 "transformers==5.*" "numpy<2" pyyaml pytest pytest-xdist
    TRANSFORMERS5_PYTHON=five/bin/python python -m pytest tests/experts/test_saved_transformers5.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FIVE = os.environ.get("TRANSFORMERS5_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FIVE, reason="TRANSFORMERS5_PYTHON does not name a Python with transformers 5; see this file"
    ),
]
TESTS = (
    "test_saved_mixture.py",
    "test_saved_model.py",
    "test_saved_threshold.py",
    "test_saved_training.py",
    "test_published_models.py",
    "test_saved_v2.py",
)


def test_the_saved_model_passes_its_tests_with_transformers_5(repo_root: Path) -> None:
    version = [FIVE, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True, check=True).stdout.startswith("5.")
    files = [str(Path("tests", "experts", name)) for name in TESTS]
    done = subprocess.run(
        [FIVE, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *files],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
