# SPDX-License-Identifier: Apache-2.0
"""The torchrun command of a launch."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from mindformers_ext.jobs.launch.arguments import Launch


def torchrun_command(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """The words of the process to start: torchrun, or python itself for a single worker.

    Each worker's output goes to a file below LOG_DIR and to this terminal. A negative TIMEOUT waits a week. Nothing of
    ``environment`` changes it (``msrun_command`` has the same form).
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
        "log-dir": launch.log_dir,
        "tee": 3,
        "rdzv-conf": f"timeout={timeout}",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, *launch.words]
