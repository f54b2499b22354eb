# SPDX-License-Identifier: Apache-2.0
"""Waiting for all ranks on a CPU, whose communication has no Barrier: MindFormers waits in every distributed load."""

from __future__ import annotations

import sys
from collections.abc import Callable

import mindspore as ms
from mindformers.tools.logger import logger
from mindspore import Tensor, ops
from mindspore.communication import comm_func


def cpu_barrier(*_: object, **__: object) -> None:
    """Return once every rank has called this: a sum of ones over the ranks, read on the host."""
    total = ops.AllReduce()(Tensor(1.0, ms.float32))
    total.asnumpy()  # the sum is there only when all ranks have given their part


def use_cpu_barrier() -> None:
    """From now on MindFormers' modules, which hold MindSpore's function under their own names, wait by ours."""
    original: Callable = comm_func.barrier
    if original is cpu_barrier:
        return
    comm_func.barrier = cpu_barrier
    for name, module in list(sys.modules.items()):
        if name.startswith("mindformers.") and getattr(module, "barrier", None) is original:
            vars(module)["barrier"] = cpu_barrier
    logger.info("The CPU has no Barrier: ranks wait for each other by an AllReduce.")
