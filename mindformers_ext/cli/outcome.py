# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit code, and a user's mistake as plain text instead of a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from mindformers_ext.core.errors import UserError

USER_MISTAKE = 2
INTERRUPTED = 130  # what a shell reports after Ctrl-C
READER_LEFT = 141  # the same of a program whose reader (head, less) has gone


def exit_code(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, unwinds: bool = True) -> int:
    """The exit code of ``run(arguments)``; a ``UserError`` is printed to stderr and gives 2, a closed pipe ends it.

    Ctrl-C gives 130, and with ``unwinds`` SIGTERM leaves as an exception too, so that what has not been finished is
    removed and processes that were started end. A run that computes for long inside a library should die at once.
    """
    try:
        with _unwound() if unwinds else nullcontext():
            code = run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python writes what is left at exit: nobody reads it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT


@contextmanager
def _unwound() -> Iterator[None]:
    """Inside, SIGTERM is a SystemExit (in the main thread, the only one that may say so)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
