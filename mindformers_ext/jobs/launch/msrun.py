# SPDX-License-Identifier: Apache-2.0
"""The msrun command of a launch, and its processes' environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.launch.arguments import Launch, with_package

MSRUN = "mindspore.parallel.cluster.run"


def msrun_command(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """The words of the process to start: msrun, or python itself for a single worker.

    Raises:
        UserError: MSRUN_BIND_CORE is neither True nor False.
    """
    if launch.workers == 1:
        return [sys.executable, *launch.words]
    bind = environment.get("MSRUN_BIND_CORE", "True")  # as MindFormers since r1.7
    if bind not in ("True", "False"):
        raise UserError(f"MSRUN_BIND_CORE={bind!r} is neither True nor False")
    msrun = Path(sys.executable).with_name("msrun")
    options: dict[str, Any] = {"bind_core": bind, "worker_num": launch.workers}
    options["local_worker_num"] = launch.local_workers
    if launch.nodes > 1:
        options |= {"master_addr": launch.master_addr, "node_rank": launch.node_rank}
    options |= {"master_port": launch.port, "log_dir": launch.log_dir, "join": True}
    options["tail_worker_log"] = launch.workers  # no worker has this number: the launcher shows the first one's log
    options["cluster_time_out"] = launch.timeout
    words = [f"--{name}={value}" for name, value in options.items()]
    return [*([str(msrun)] if msrun.is_file() else [sys.executable, "-m", MSRUN]), *words, *launch.words]


def msrun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The processes' environment: our package importable, this python first, logs where MindFormers' launcher puts
    them."""
    result, here = with_package(environment), Path.cwd()
    suffix = f"_{environment['MF_LOG_SUFFIX']}" if environment.get("MF_LOG_SUFFIX") else ""
    result["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if not environment.get("LOG_MF_PATH"):
        result["LOG_MF_PATH"] = str(here / "output" / f"log{suffix}")
    if environment.get("PLOG_REDIRECT_TO_OUTPUT", "False") not in ("", "False"):
        result["ASCEND_PROCESS_LOG_PATH"] = str(here / "output" / f"plog{suffix}")
    return result
