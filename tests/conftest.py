# SPDX-License-Identifier: Apache-2.0
"""What every test shares. Loads no framework: tests/unit must stay under a minute."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only; read when it is first imported
# MindSpore fails to import where a tokenizer has loaded protobuf's C implementation before it.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns when a test forks


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root folder of the working tree."""
    return Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped, with the reason, where torch sees no CUDA device."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
