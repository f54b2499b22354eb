# SPDX-License-Identifier: Apache-2.0
"""``bash scripts/torchrun_launcher.sh``: start a script on the GPUs of one or several machines with torchrun."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.cli.outcome import USER_MISTAKE
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.launch.msrun import DEFAULTS, usage
from mindformers_ext.jobs.launch.torchrun import (
    Launch,
    WrongCountError,
    check_torch_master,
    read_torch_launch,
    torchrun_command,
)

HELP = f"""\
usage: 1, 2, 6 or 9 arguments
{usage().replace("msrun", "torchrun")}

Starts WORKERS processes of COMMAND with torchrun. COMMAND is one quoted argument: a script and its options, cut into
words as a shell does, but nothing in it is expanded or run by a shell.
  WORKERS        processes of all machines together (default {DEFAULTS["WORKERS"]}); 1 runs the script without torchrun
  LOCAL_WORKERS  processes of this machine, the same on all (default WORKERS)
  MASTER_ADDR    address of the machine with NODE_RANK 0 (default {DEFAULTS["MASTER_ADDR"]})
  PORT           on the master, 1024 to 65535 (default {DEFAULTS["PORT"]})
  NODE_RANK      number of this machine, from 0 (default 0)
  LOG_DIR        folder of the workers' logs (default {DEFAULTS["LOG_DIR"]})
  JOIN           True: show the logs and wait for the end; False: run in the background, its output goes to
                 LOG_DIR/launcher.log (default False)
  TIMEOUT        seconds for all workers to find the master, -1 for a week (default {DEFAULTS["TIMEOUT"]})
environment:
  TORCHRUN_DRY_RUN=1   print the command and stop
  MF_LOG_SUFFIX=x      LOG_DIR_x
exit code: 0 done (JOIN False: started), 1 the job failed or the number of arguments is wrong, 2 a mistake in the
arguments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    try:
        launch = read_torch_launch(arguments, os.environ)
        command = torchrun_command(launch)
        if os.environ.get("TORCHRUN_DRY_RUN", "") not in ("", "0", "False"):
            print(shlex.join(command))
            return 0
        if launch.workers > 1:
            check_torch_master(launch)
    except WrongCountError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    print(f"Running: {shlex.join(command)}\nLogs: {launch.log_dir.absolute()}", flush=True)
    return _start(launch, command)


def _start(launch: Launch, command: list[str]) -> int:
    """Become torchrun, which ends its workers when it is ended; in the background in a session of its own."""
    launch.log_dir.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    if not launch.join:
        log = launch.log_dir / "launcher.log"
        watcher = os.fork()
        if watcher:
            print(f"The job runs in the background; its output goes to {log.absolute()}. Stop it: kill {watcher}")
            return 0
        os.setsid()
        with open(os.devnull, "rb") as nothing, open(log, "wb", buffering=0) as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    os.execve(command[0], command, environment)  # never returns


if __name__ == "__main__":
    raise SystemExit(main())
