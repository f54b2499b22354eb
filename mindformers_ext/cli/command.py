# SPDX-License-Identifier: Apache-2.0
"""A command line: its options, what runs with them, and kinds of options that several commands have."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.cli.outcome import exit_code
from mindformers_ext.core.layers import DTYPE_NAMES, DTYPE_WORDS, dtype_name

WIDTH = 100  # columns of the description; examples keep their lines
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def read_plainly(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments as argparse reads them."""
    return parser.parse_args(argv)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. ``options`` adds them to a parser, ``run`` does the work and returns the exit code.

    ``epilog`` stands below the options with its lines as they are. ``read`` makes the arguments where options are more
    than argparse knows. ``unwinds``: see ``cli.outcome.exit_code``. An option is never known by its beginning alone.
    ``blas_threads`` false: numpy's BLAS gets none of its own, since the command multiplies nothing by it, or each of
    its threads for itself; from the time numpy is loaded they would wait busily, 0.1 s of processor time.
    """

    prog: str
    description: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""
    usage: str | None = None
    read: Callable[[argparse.ArgumentParser, Sequence[str] | None], argparse.Namespace] = read_plainly
    unwinds: bool = True
    blas_threads: bool = True

    def parser(self) -> argparse.ArgumentParser:
        """A parser that knows the command's options."""
        result = argparse.ArgumentParser(
            prog=self.prog,
            usage=self.usage,
            description=textwrap.fill(self.description, WIDTH),
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.options(result)
        return result

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run with ``argv`` (default: the process's): what ``run`` returns, 2 on a user's mistake."""
        if not self.blas_threads and "numpy" not in sys.modules:
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        return exit_code(lambda _: self.run(self.read(self.parser(), argv)), argparse.Namespace(), self.unwinds)


@dataclass(frozen=True)
class Subcommand:
    """A command below another: ``about`` says in a few words what it does, the rest as for ``Command``."""

    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_subcommands(parser: argparse.ArgumentParser, table: Mapping[str, Subcommand]) -> None:
    """The commands of ``table`` by name; the one that is given is ``command`` of the arguments."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(table))
    for name, row in table.items():
        text = f"{row.about[0].upper()}{row.about[1:]}."
        row.options(commands.add_parser(name, allow_abbrev=False, help=row.about, description=text))


def boolean(text: str) -> bool:
    """True or False from the words for them; "False" is False."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return BOOLEANS[text.lower()]


def dtype(text: str) -> str:
    """The name of an element type, from any word for it."""
    name = dtype_name(text)
    if name is None:
        words = ", ".join((*DTYPE_NAMES, *DTYPE_WORDS))
        raise argparse.ArgumentTypeError(f"'{text}' is no type of weights: choose one of {words}")
    return name


def optional_path(text: str) -> Path | None:
    """A path; "None" and "" are none, as MindFormers' scripts have it."""
    return None if text in ("", "None") else Path(text)


def add_switch(target: argparse._ActionsContainer, *names: str, text: str, default: bool | None = False) -> None:
    """An option that is True, False, or True when given alone; ``default`` None tells it from one that is not given."""
    target.add_argument(*names, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=text)
