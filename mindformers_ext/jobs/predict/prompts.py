# SPDX-License-Identifier: Apache-2.0
"""Which prompts ``--predict_data`` names: texts, the lines of a file, or those of standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.text_lines import decode_lines, read_lines

STANDARD_INPUT = "-"
LONGEST_NAME = 256  # bytes of a file's name


def read_prompts(items: Sequence[str]) -> list[str]:
    """The prompts of ``--predict_data``. The blank lines of a file keep their place, so that answers stand in the lines
    of their prompts.

    Raises:
        UserError: no such file, one that is no text, or no prompt at all.
    """
    if len(items) == 1 and items[0] == STANDARD_INPUT:
        return _some(_from_stdin(), "standard input")
    if len(items) == 1 and len(items[0].encode(errors="replace")) < LONGEST_NAME and "\n" not in items[0]:
        path = Path(items[0])
        if path.is_file():
            return _some(read_lines(path), str(path))
        if path.suffix == ".txt" and " " not in items[0]:
            raise UserError(f"--predict_data {path} does not exist: give a text file, or the prompt itself")
    problems = Problems("prompts")
    for number, text in enumerate(items, 1):
        if not text.strip():
            problems.add(f"prompt {number} is empty", "give some text, or leave it out")
    problems.raise_if_any()
    return list(items)


def _from_stdin() -> list[str]:
    raw = getattr(sys.stdin, "buffer", None)  # bytes: UTF-8 whatever the locale is
    return decode_lines(raw.read() if raw else sys.stdin.read().encode(), "standard input")


def _some(lines: list[str], where: str) -> list[str]:
    if not any(line.strip() for line in lines):
        raise UserError(f"{where} holds no prompt: write one on each line")
    return lines
