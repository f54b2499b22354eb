# SPDX-License-Identifier: Apache-2.0
"""``bash scripts/msrun_launcher.sh`` and ``scripts/torchrun_launcher.sh``: start a script's processes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code
from mindformers_ext.cli.start import check_installed
from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.jobs.launch.arguments import (
    DEFAULTS,
    MSRUN_SCRIPT,
    Launch,
    WrongCountError,
    check_master,
    read_launch,
    usage,
)
from mindformers_ext.jobs.launch.msrun import msrun_command, msrun_environment
from mindformers_ext.jobs.launch.program import MSRUN as MSRUN_PROGRAM
from mindformers_ext.jobs.launch.program import TORCHRUN as TORCHRUN_PROGRAM
from mindformers_ext.jobs.launch.program import Program
from mindformers_ext.jobs.launch.torchrun import torchrun_command, torchrun_environment
from mindformers_ext.jobs.run.display import LAUNCHER, LINES, LIVE, Lines, Sink, Terminal

FAILED = 1
FRAMEWORKS = {"msrun": "mindspore", "torchrun": "torch"}  # whose part the program is


@dataclass(frozen=True, kw_only=True)
class BackEnd:
    """The program that starts the processes.

    ``script``: its file in scripts/, or the words by which it was called. ``command`` and ``environment`` make its
    words and variables. The texts are for ``--help``: what TIMEOUT -1 means, and the variables read.
    """

    program: Program
    script: str
    command: Callable[[Launch, Mapping[str, str]], list[str]]
    environment: Callable[[Mapping[str, str]], dict[str, str]]
    forever: str
    variables: str

    @property
    def name(self) -> str:
        """The program's name."""
        return self.program.name

    @property
    def only_shows(self) -> str:
        """The variable that asks for the command's words alone."""
        return f"{self.name.upper()}_DRY_RUN"

    def help(self) -> str:
        """The text of ``--help``."""
        return f"""\
usage: 1, 2, 6 or 9 arguments
{usage(self.script)}

Starts WORKERS processes of COMMAND with {self.name}. COMMAND is one quoted argument: a script and its options, cut into
words as a shell does, with its inner quotes, but nothing in it is expanded or run by a shell.
  WORKERS        processes of all machines together (default {DEFAULTS["WORKERS"]}); 1: the script without {self.name}
  LOCAL_WORKERS  processes of this machine, the same on all (default WORKERS)
  MASTER_ADDR    address of the machine with NODE_RANK 0 (default {DEFAULTS["MASTER_ADDR"]})
  PORT           where the master listens, 1024 to 65535 (default {DEFAULTS["PORT"]})
  NODE_RANK      number of this machine, from 0 (default 0)
  LOG_DIR        folder of the logs (default {DEFAULTS["LOG_DIR"]})
  JOIN           True: show the first worker's lines and wait for the end; False: run in the background, the same goes
                 to LOG_DIR/launcher.log (default False)
  TIMEOUT        seconds for all workers to find the master, -1 {self.forever} (default {DEFAULTS["TIMEOUT"]})
environment:
  {self.only_shows + "=1":<24} print the command and stop
{self.variables}
files: LOG_DIR/worker_RANK.log each worker's whole log, LOG_DIR/{self.name}.log what {self.name} says.
exit code: 0 done (JOIN False: started), 1 the job failed or the number of arguments is wrong, 2 a mistake in the
arguments, 130 stopped.
"""


def _supervised(end: BackEnd, launch: Launch, command: Sequence[str], environment: Mapping[str, str]) -> int:
    from mindformers_ext.jobs.launch.screen import Screen
    from mindformers_ext.jobs.launch.supervise import supervise

    is_live = launch.join and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    sink: Sink = Terminal(sys.stdout) if is_live else Lines(sys.stdout)
    told = {**environment, LAUNCHER: LIVE if is_live else LINES}
    code = supervise(launch, end.program, command, told, Screen(sink))
    if not launch.join:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the job ended with exit code {code}", flush=True)
    return code


MSRUN = BackEnd(
    program=MSRUN_PROGRAM,
    script=MSRUN_SCRIPT,
    command=msrun_command,
    environment=msrun_environment,
    forever="for ever",
    variables="""\
  MSRUN_BIND_CORE=False    do not bind workers to cores
  MF_LOG_SUFFIX=x          folders LOG_DIR_x and output/log_x
  LOG_MF_PATH, PLOG_REDIRECT_TO_OUTPUT=True   as in MindFormers""",
)
TORCHRUN = BackEnd(
    program=TORCHRUN_PROGRAM,
    script="torchrun_launcher.sh",
    command=torchrun_command,
    environment=torchrun_environment,
    forever="for a week",
    variables="  MF_LOG_SUFFIX=x          folder LOG_DIR_x",
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the launcher; ``--torchrun`` in front of the arguments chooses torchrun instead of msrun.

    ``prog``: the words by which it was called, where that is none of the scripts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = TORCHRUN if arguments[:1] == ["--torchrun"] else MSRUN
    arguments = arguments[end is TORCHRUN :]
    if prog:
        end = replace(end, script=f"{prog} --torchrun" if end is TORCHRUN else prog)
    if arguments in (["-h"], ["--help"]):
        print(end.help(), end="")
        return 0
    return exit_code(lambda _: _launch(end, arguments), argparse.Namespace(), unwinds=False)


def _launch(end: BackEnd, arguments: Sequence[str]) -> int:
    try:
        launch = read_launch(arguments, os.environ, end.script)
    except WrongCountError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED  # as MindFormers' launcher
    command, environment = end.command(launch, os.environ), end.environment(os.environ)
    if os.environ.get(end.only_shows, "") not in ("", "0", "False"):
        print(shlex.join(command))
        return 0
    if launch.workers > 1:
        check_installed(FRAMEWORKS[end.name])
        check_master(launch, end.script)
    print(f"Running: {shlex.join(command)}\nLogs: {launch.log_dir.absolute()}", flush=True)
    launch.log_dir.mkdir(parents=True, exist_ok=True)
    if launch.join:
        return _supervised(end, launch, command, environment)
    log = launch.log_dir / "launcher.log"
    watcher = _fork_away(log)
    if watcher:
        print(f"The job runs in the background; its course goes to {log.absolute()}. Stop it: kill {watcher}")
        return 0
    # nothing of the caller may run in this copy of it
    os._exit(exit_code(lambda _: _supervised(end, launch, command, environment), argparse.Namespace(), unwinds=False))


def _fork_away(log: Path) -> int:
    """A copy of this process, which outlives it and its terminal and writes to ``log``: its pid, or 0 inside it."""
    sys.stdout.flush()
    with (
        open(os.devnull, "rb") as nothing,
        os.fdopen(open_plain(log, AFRESH), "wb", buffering=0) as file,
    ):  # there before this process ends
        watcher = os.fork()
        if not watcher:
            os.setsid()
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    return watcher


if __name__ == "__main__":
    raise SystemExit(main())
