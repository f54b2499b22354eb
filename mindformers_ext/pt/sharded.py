# SPDX-License-Identifier: Apache-2.0
"""Several processes: FSDP2 and expert parallel."""

from __future__ import annotations

from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.pt.parallel import Ranks


def open_ranks(parallel: ParallelSpec, device: str) -> Ranks:
    """The processes that torchrun started, or this one alone."""
    return Ranks()
