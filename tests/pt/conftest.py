# SPDX-License-Identifier: Apache-2.0
"""What the tests of PyTorch networks share: no MindSpore here."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers wherever it stands, on one thread: the tensors are tiny."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
