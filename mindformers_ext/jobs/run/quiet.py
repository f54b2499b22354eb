# SPDX-License-Identifier: Apache-2.0
"""A process whose libraries are silent: what they print goes to a file, whatever language prints it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.plain_file import open_plain
from mindformers_ext.jobs.run.display import current

OUTPUT = "output.log"
OURS = f"{os.sep}mindformers_ext{os.sep}"  # in the path of every file of this package
RESULTS = ("Eval result:",)  # beginnings of MindFormers' own lines that people want to see


def rank_of(environment: Mapping[str, str]) -> int:
    """This process's rank as msrun or torchrun gave it; 0 alone."""
    rank = environment.get("RANK") or environment.get("RANK_ID", "0")
    return int(rank) if rank.isdecimal() else 0


@contextmanager
def output_to(path: Path) -> Iterator[TextIO]:
    """Inside, file descriptors 1 and 2 are the end of ``path``; yields the stream that 2 was.

    C++ and threads print there as well, and nothing waits for a reader, as it would with a pipe. An exception's text is
    kept in the file too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open_plain(path)
    _flush()
    kept = [os.dup(1), os.dup(2)]
    stream = os.fdopen(os.dup(kept[1]), "w", encoding="utf-8", errors="replace")
    os.write(log, f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n".encode())
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield stream
    except Exception as error:
        with os.fdopen(open_plain(path), "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        if not isinstance(error, UserError):
            stream.write(f"the run failed; all that it has printed: {path}\n")
        raise
    finally:
        _flush()
        stream.close()
        for place, old in enumerate(kept, 1):
            os.dup2(old, place)
            os.close(old)
        os.close(log)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


class Passed(logging.Handler):
    """Passes on to the display what people should see of a log: our own warnings, errors of anyone, results."""

    def emit(self, record: logging.LogRecord) -> None:
        """Judge one record."""
        text = record.getMessage()
        warns = record.levelno >= (logging.WARNING if OURS in record.pathname else logging.ERROR)
        if warns or text.startswith(RESULTS):
            current().say(f"{record.levelname.lower()}: {text}" if warns else text)
