# SPDX-License-Identifier: Apache-2.0
"""What the tests of PyTorch networks share: no MindSpore here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.mixtures import mixture_config, mixture_job, train_checked


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers wherever it stands, on one thread: the tensors are tiny."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mixed_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML of ten steps over three domains."""
    return mixture_job(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="session")
def whole(mixed_job: Path) -> list[dict]:
    """Metrics of its run, which stands in the folder of the same name."""
    torch.set_num_threads(1)  # so that equal steps are equal to the last bit
    return train_checked(mixture_config(mixed_job, "whole"))
