# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit code, and a user's mistake as plain text instead of a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from mindformers_ext.core.errors import UserError

USER_MISTAKE = 2


def exit_code(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The exit code of ``run(arguments)``; a ``UserError`` is printed to stderr and gives 2."""
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
