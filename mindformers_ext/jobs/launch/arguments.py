# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``scripts/msrun_launcher.sh`` and ``scripts/torchrun_launcher.sh``, read and judged.

The argument forms are MindFormers' (scripts/msrun_launcher.sh of r1.3 to r1.7). Nothing here goes through a shell: the
command text is cut into words once, and the words are handed on as they are.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError

ONE_NODE = ("WORKERS", "PORT", "LOG_DIR", "JOIN", "TIMEOUT")
MANY_NODES = ("WORKERS", "LOCAL_WORKERS", "MASTER_ADDR", "PORT", "NODE_RANK", "LOG_DIR", "JOIN", "TIMEOUT")
FORMS: dict[int, tuple[str, ...]] = {1: (), 2: ("WORKERS",), 6: ONE_NODE, 9: MANY_NODES}
DEFAULTS = {
    "WORKERS": "8",
    "MASTER_ADDR": "127.0.0.1",
    "PORT": "8118",
    "NODE_RANK": "0",
    "LOG_DIR": "output/msrun_log",
    "JOIN": "False",
    "TIMEOUT": "7200",
}
MSRUN_SCRIPT = "msrun_launcher.sh"
PORTS = (1024, 65535)  # msrun takes no others
MOST = {"WORKERS": 2**20, "LOCAL_WORKERS": 2**12}

_OPERATORS = (";", "|", "&", ">", "<", "`", "$(")
_PIECE = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\$\(|\\.|.""", re.DOTALL)  # quoted, $(, escaped, or one character


class WrongCountError(UserError):
    """The number of arguments fits no form."""


@dataclass(frozen=True)
class Launch:
    """One call of the launcher. ``timeout`` (s) is for building the cluster; a negative one waits forever."""

    words: tuple[str, ...]
    workers: int
    local_workers: int
    master_addr: str
    port: int
    node_rank: int
    log_dir: Path
    join: bool
    timeout: int

    @property
    def nodes(self) -> int:
        """Machines of the job."""
        return self.workers // self.local_workers

    @property
    def machine(self) -> str:
        """What the names of this machine's own files end with: machines may share LOG_DIR."""
        return f"_{self.node_rank}" if self.nodes > 1 and self.node_rank > 0 else ""

    @property
    def ranks(self) -> range:
        """Ranks that run on this machine."""
        first = self.node_rank * self.local_workers if self.nodes > 1 else 0
        return range(first, first + self.local_workers)

    def log_of(self, rank: int) -> Path:
        """The log file of a worker."""
        return self.log_dir / f"worker_{rank}.log"


def usage(caller: str) -> str:
    """The argument forms of a launcher, one a line; ``caller``: the words that call it, or its file in scripts/."""
    words = f"bash scripts/{caller}" if caller.endswith(".sh") else caller
    lines = [f"  {words} {' '.join(('COMMAND', *names))}" for names in FORMS.values()]
    return "\n".join(lines)


def read_launch(arguments: Sequence[str], environment: Mapping[str, str], script: str = MSRUN_SCRIPT) -> Launch:
    """The job that the ``arguments`` of the launcher ``script`` describe.

    Raises:
        WrongCountError: neither 1, 2, 6 nor 9 arguments.
        UserError: lists every value out of range, what was given and what is allowed.
    """
    if len(arguments) not in FORMS:
        given = "\n".join(f"  {place}: {text}" for place, text in enumerate(arguments, 1)) or "  (nothing)"
        raise WrongCountError(
            f"{len(arguments)} arguments were given, COMMAND included; 1, 2, 6 or 9 are allowed.\n"
            f"given:\n{given}\nallowed:\n{usage(script)}\nCOMMAND is one argument: quote it."
        )
    values = {**DEFAULTS, **dict(zip(FORMS[len(arguments)], arguments[1:], strict=True))}
    values.setdefault("LOCAL_WORKERS", values["WORKERS"])
    problems = Problems(script)
    numbers = {
        name: _number(name, values[name], problems)
        for name in ("WORKERS", "LOCAL_WORKERS", "PORT", "NODE_RANK", "TIMEOUT")
    }
    problems.one_of("JOIN", values["JOIN"], ("True", "False"))
    words = _words(arguments[0], problems)
    if not values["LOG_DIR"]:
        problems.add("LOG_DIR is empty", "name a folder, for example output/msrun_log")
    problems.raise_if_any()
    _check_numbers(numbers, problems)
    problems.raise_if_any()
    suffix = environment.get("MF_LOG_SUFFIX", "")
    log_dir = Path(values["LOG_DIR"] + (f"_{suffix}" if suffix else ""))
    return Launch(
        tuple(words),
        numbers["WORKERS"],
        numbers["LOCAL_WORKERS"],
        values["MASTER_ADDR"],
        numbers["PORT"],
        numbers["NODE_RANK"],
        log_dir,
        values["JOIN"] == "True",
        numbers["TIMEOUT"],
    )


def _number(name: str, text: str, problems: Problems) -> int:
    if re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        return int(text)
    problems.add(
        f"{name}={text[:80]!r} is not a whole number of up to 18 digits",
        "the order of the arguments is "
        + ", ".join(MANY_NODES)
        + " for 9 and "
        + ", ".join(ONE_NODE)
        + " for 6, each after COMMAND",
    )
    return 0


def _check_numbers(numbers: Mapping[str, int], problems: Problems) -> None:
    workers, local, rank = numbers["WORKERS"], numbers["LOCAL_WORKERS"], numbers["NODE_RANK"]
    problems.positive("WORKERS", workers)
    problems.positive("LOCAL_WORKERS", local)
    for name in ("WORKERS", "LOCAL_WORKERS"):
        if numbers[name] > MOST[name]:
            problems.add(f"{name}={numbers[name]} is out of range", f"use 1 to {MOST[name]}")
    if not PORTS[0] <= numbers["PORT"] <= PORTS[1]:
        problems.add(f"PORT={numbers['PORT']} is out of range", f"use {PORTS[0]} to {PORTS[1]}")
    if numbers["TIMEOUT"] == 0:
        problems.add("TIMEOUT=0 gives the cluster no time", "use seconds above 0, or -1 to wait forever")
    if problems.lines:
        return
    if local > workers:
        problems.add(f"LOCAL_WORKERS={local} exceeds WORKERS={workers}", "WORKERS counts all machines together")
    elif workers % local:
        problems.divides("WORKERS", workers, "LOCAL_WORKERS", local)
    elif not 0 <= rank < workers // local:
        problems.add(
            f"NODE_RANK={rank} is out of range",
            f"WORKERS/LOCAL_WORKERS = {workers // local} machines have the ranks 0 to {workers // local - 1}",
        )


def _words(text: str, problems: Problems) -> list[str]:
    try:
        words = split_command(text)
    except ValueError as error:
        problems.add(f"COMMAND {text!r} cannot be cut into words ({error})", "close every quote")
        return []
    words = words[1:] if words and words[0] in ("python", "python3") else words  # msrun starts python itself
    if not words:
        problems.add("COMMAND is empty", 'give the script and its options, "run_mindformer.py --config FILE ..."')
        return []
    script = find_script(words[0])
    if script is None:
        problems.add(
            f"the script {words[0]} of COMMAND does not exist", "give its path from here, or from the repository's root"
        )
        return []
    return [str(script), *words[1:]]


def split_command(text: str) -> list[str]:
    """The words of a command as a shell would cut it, quotes and backslashes followed, nothing expanded.

    A backslash at a line's end joins the lines. Pipes, redirections, command lists and substitutions need a shell and
    are refused outside quotes.

    Raises:
        ValueError: a quote is not closed, or an operator of the shell stands outside quotes.
    """
    joined = []
    for piece in _PIECE.findall(text):
        if piece == "\\\n":
            continue
        if piece in _OPERATORS:
            raise ValueError(f"{piece} outside quotes needs a shell: the launcher starts one program")
        joined.append(piece.replace("\\\n", "") if piece.startswith('"') else piece)
    return shlex.split("".join(joined))


def find_script(name: str) -> Path | None:
    """``name`` from here, else from the repository's root; None when neither exists."""
    path = Path(os.path.expanduser(name))  # leaves a user that does not exist as it is
    if path.is_file():
        return path
    beside = Path(__file__).resolve().parents[3] / name
    return beside if beside.is_file() else None


def check_master(launch: Launch, script: str) -> None:
    """Whether this machine can play its part: the master owns the address and the port is free.

    Raises:
        UserError: an unknown host name, an address that belongs to the wrong machine, or a port in use.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(launch.master_addr, launch.port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, ValueError) as error:  # a name with an empty part, or with letters no name has
        raise UserError(
            f"MASTER_ADDR={launch.master_addr[:80]} is no address ({error.args[-1]}): give the IP address of "
            "the machine with NODE_RANK 0, the same on all machines"
        ) from error
    here = _can_bind(family, (place[0], 0))
    if launch.nodes > 1 and launch.node_rank == 0 and not here:
        raise UserError(
            f"MASTER_ADDR={launch.master_addr} is not an address of this machine, but NODE_RANK 0 is the "
            "master: give this machine's address (ip addr shows it), or its own NODE_RANK"
        )
    if launch.nodes > 1 and launch.node_rank > 0 and here:
        raise UserError(
            f"NODE_RANK={launch.node_rank}, but MASTER_ADDR={launch.master_addr} is an address of this "
            "machine: the master has NODE_RANK 0; every machine gets the master's address"
        )
    if here and not _can_bind(family, place[:2]):
        raise UserError(
            f"port {launch.port} of {launch.master_addr} is taken: end the job that uses it (ss -ltnp 'sport = "
            f":{launch.port}' names it), or give another PORT, the same on all machines:\n{usage(script)}"
        )


def _can_bind(family: int, place: tuple) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that only cools down is free
        try:
            probe.bind(place)
            return True
        except OSError:
            return False


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with our package importable, from wherever the processes start."""
    root = str(Path(__file__).resolve().parents[3])
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))}
