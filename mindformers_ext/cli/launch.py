# SPDX-License-Identifier: Apache-2.0
"""``bash scripts/msrun_launcher.sh``: start a script on the devices of one or several machines with msrun."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence

from mindformers_ext.cli.outcome import USER_MISTAKE
from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.launch.msrun import (
    DEFAULTS,
    Launch,
    WrongCountError,
    check_master,
    command_of,
    environment_of,
    read_launch,
    usage,
)

HELP = f"""\
usage: 1, 2, 6 or 9 arguments
{usage()}

Starts WORKERS processes of COMMAND with msrun. COMMAND is one quoted argument: a script and its options, cut into words
as a shell does, with its inner quotes, but nothing in it is expanded or run by a shell.
  WORKERS        processes of all machines together (default {DEFAULTS["WORKERS"]}); 1 runs the script without msrun
  LOCAL_WORKERS  processes of this machine, the same on all (default WORKERS)
  MASTER_ADDR    address of the machine with NODE_RANK 0 (default {DEFAULTS["MASTER_ADDR"]})
  PORT           of the scheduler on the master, 1024 to 65535 (default {DEFAULTS["PORT"]})
  NODE_RANK      number of this machine, from 0 (default 0)
  LOG_DIR        folder of scheduler.log and worker_<rank>.log (default {DEFAULTS["LOG_DIR"]})
  JOIN           True: show the logs and wait for the end; False: run in the background, its end is written to
                 LOG_DIR/launcher.log (default False)
  TIMEOUT        seconds for all workers to find the master, -1 for ever (default {DEFAULTS["TIMEOUT"]})
environment:
  MSRUN_DRY_RUN=1          print the command and stop
  MSRUN_BIND_CORE=False    do not bind workers to cores
  MF_LOG_SUFFIX=x          folders LOG_DIR_x and output/log_x
  LOG_MF_PATH, PLOG_REDIRECT_TO_OUTPUT=True   as in MindFormers
exit code: 0 done (JOIN False: started), 1 the job failed or the number of arguments is wrong, 2 a mistake in the
arguments, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    try:
        launch = read_launch(arguments, os.environ)
        command, environment = command_of(launch, os.environ), environment_of(os.environ)
        if os.environ.get("MSRUN_DRY_RUN", "") not in ("", "0", "False"):
            print(shlex.join(command))
            return 0
        if launch.workers > 1:
            check_master(launch)
    except WrongCountError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1  # as MindFormers' launcher
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    print(f"Running: {shlex.join(command)}\nLogs: {launch.log_dir.absolute()}", flush=True)
    if launch.join:
        return _supervise(launch, command, environment)
    return _in_background(launch, command, environment)


def _supervise(launch: Launch, command: Sequence[str], environment: dict[str, str]) -> int:
    from mindformers_ext.jobs.launch.supervise import supervise

    return supervise(launch, command, environment, lambda text: print(text, end="", flush=True))


def _in_background(launch: Launch, command: Sequence[str], environment: dict[str, str]) -> int:
    """Watch the job from a process of its own, which outlives this one and its terminal."""
    launch.log_dir.mkdir(parents=True, exist_ok=True)
    log = launch.log_dir / "launcher.log"
    log.write_text("", encoding="utf-8")
    sys.stdout.flush()
    watcher = os.fork()
    if watcher:
        print(f"The job runs in the background; how it ends is written to {log.absolute()}. Stop it: kill {watcher}")
        return 0
    os.setsid()
    with open(os.devnull, "rb") as nothing, open(log, "ab", buffering=0) as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = _supervise(launch, command, environment)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the job ended with exit code {code}", flush=True)
    os._exit(code)  # nothing of the caller may run in this copy of it


if __name__ == "__main__":
    raise SystemExit(main())
