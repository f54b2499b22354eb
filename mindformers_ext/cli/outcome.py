# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit code, and a user's mistake as plain text instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from mindformers_ext.core.errors import UserError

USER_MISTAKE = 2
READER_LEFT = 141  # what a shell reports of a program whose reader (head, less) has gone


def exit_code(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The exit code of ``run(arguments)``; a ``UserError`` is printed to stderr and gives 2, a closed pipe ends it."""
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except BrokenPipeError:
        # Python writes what is left at exit: nobody reads it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
