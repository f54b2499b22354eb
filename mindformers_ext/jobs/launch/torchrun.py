# SPDX-License-Identifier: Apache-2.0
"""The torchrun command of a launch; its arguments are read and judged by ``jobs.launch.msrun``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.launch.msrun import Launch, WrongCountError, check_master, read_launch

MSRUN_SCRIPT, SCRIPT = "msrun_launcher.sh", "torchrun_launcher.sh"


def read_torch_launch(arguments: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """As ``jobs.launch.msrun.read_launch``, with this launcher's name in the messages."""
    try:
        return read_launch(arguments, environment)
    except UserError as error:
        raise type(error)(str(error).replace(MSRUN_SCRIPT, SCRIPT)) from error


def check_torch_master(launch: Launch) -> None:
    """As ``jobs.launch.msrun.check_master``."""
    try:
        check_master(launch)
    except UserError as error:
        raise UserError(str(error).replace(MSRUN_SCRIPT, SCRIPT)) from error


def torchrun_command(launch: Launch) -> list[str]:
    """The words of the process to start: torchrun, or python itself for a single worker.

    Each worker's output goes to a file below LOG_DIR and to this terminal. A negative TIMEOUT waits a week.
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


__all__ = ["Launch", "WrongCountError", "check_torch_master", "read_torch_launch", "torchrun_command"]
