# SPDX-License-Identifier: Apache-2.0
"""JSON that others wrote: its size is bounded before it is parsed, and what it may hold while it is.

A value needs up to a hundred times the memory of its text (``[],`` becomes a list), so the marks that make values are
counted before. Names that stand twice, integers of any length and halves of surrogate pairs are legal for Python's
reader and not for whoever reads the result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

DIGITS = 64  # of an integer; nothing that is counted has more than 20
MARKS = "[{,:"  # a text with n of them holds at most n + 1 values and names
HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_WRITTEN_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Bounds:
    """How large a text may be: bytes as UTF-8, and ``MARKS``."""

    nbytes: int
    marks: int


SETTINGS = Bounds(16 * 2**20, 1_000_000)  # config.json, an index; real ones have up to 100,000 marks
TABLES = Bounds(40 * 2**20, 3_000_000)  # vocabularies, headers of tensors: the largest known is half of it


class JsonError(ValueError):
    """What is wrong with a text, as the end of a sentence about the file."""


class TwiceError(JsonError):
    """A name that an object holds twice: Python's reader keeps the last of two and drops the first silently."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the name '{name[:80]}' occurs twice")
        self.name = name


def parse_json(text: str | bytes, bounds: Bounds = SETTINGS) -> Any:
    """The value of ``text`` (bytes are UTF-8, a byte order mark is passed over).

    Raises:
        JsonError: not JSON, beyond ``bounds``, too deep, a name twice in one object, an integer of more than 64 digits,
            or half of a surrogate pair.
    """
    if isinstance(text, bytes):
        if len(text) > bounds.nbytes:
            raise JsonError(f"{len(text)} bytes are more than {bounds.nbytes}")
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(f"not UTF-8 (byte {error.start})") from error
    check_marks(text, bounds)
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError("nested too deeply") from error
    if _WRITTEN_HALF.search(text) and has_half_pair(value):
        raise JsonError("a text holds half of a surrogate pair (\\ud800 to \\udfff)")
    return value


def read_json(path: Path, advice: str = "copy it again", bounds: Bounds = SETTINGS) -> Any:
    """The value in the file at ``path``, of which no more than ``bounds`` allow is read.

    Raises:
        UserError: no such file, or what ``parse_json`` refuses; ends with ``advice``.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is not a file: check the path")
    try:
        with path.open("rb") as file:
            return parse_json(file.read(bounds.nbytes + 1), bounds)
    except JsonError as error:
        raise UserError(f"'{path}' is not JSON that can be used ({error}): {advice}") from error


def read_object(path: Path, advice: str = "copy it again", bounds: Bounds = SETTINGS) -> dict[str, Any]:
    """As ``read_json``, for a file whose value must be an object."""
    value = read_json(path, advice, bounds)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a {type(value).__name__}, not a table of names and values: {advice}")
    return value


def check_marks(text: str, bounds: Bounds) -> None:
    """Refuse (``JsonError``) a text that could hold more values than ``bounds`` allow."""
    if len(text) <= bounds.marks:
        return
    marks = sum(map(text.count, MARKS))
    if marks > bounds.marks:
        raise JsonError(f"it may hold {marks} values, more than {bounds.marks}")


def has_half_pair(value: Any) -> bool:
    """Whether any text in ``value`` holds half of a surrogate pair."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and not item.isascii() and HALF_PAIR.search(item):
            return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise TwiceError(name)
            seen.add(name)
    return result


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise JsonError(f"an integer of {len(text)} digits")
    return int(text)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)
