# SPDX-License-Identifier: Apache-2.0
"""What the tests of PyTorch networks share: no MindSpore here, two threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers wherever it stands."""
    torch.manual_seed(0)
