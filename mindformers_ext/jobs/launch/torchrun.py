# SPDX-License-Identifier: Apache-2.0
"""The torchrun command of a launch, and its processes' environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from mindformers_ext.jobs.launch.arguments import Launch, with_package

LINE_PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"  # jobs.launch.program reads what it asks for


def torchrun_command(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """The words of the process to start: torchrun, or python itself for a single worker.

    The lines of all workers come through torchrun. A negative TIMEOUT waits a week. Nothing of ``environment`` changes
    it (``msrun_command`` has the same form).
    """
    if launch.workers == 1:
        return [sys.executable, *launch.words]
    timeout = launch.timeout if launch.timeout > 0 else 7 * 24 * 3600
    options = {
        "nnodes": launch.nodes,
        "nproc-per-node": launch.local_workers,
        "node-rank": launch.node_rank,
        "master-addr": launch.master_addr,
        "master-port": launch.port,
        "log-dir": launch.log_dir / f"torchrun{launch.machine}",
        "tee": 3,
        "rdzv-conf": f"timeout={timeout}",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, *launch.words]


def torchrun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The processes' environment: our package importable, and every line of a worker marked with its rank."""
    return {**with_package(environment), LINE_PREFIX: "[worker${rank}]:"}
