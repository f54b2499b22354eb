# SPDX-License-Identifier: Apache-2.0
"""The tests of experts need torch, on one thread: the tensors are tiny."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="experts are cut and trained with torch")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers wherever it stands."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
