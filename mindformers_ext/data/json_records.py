# SPDX-License-Identifier: Apache-2.0
"""JSON objects out of a file of any size, one at a time: a JSON list, or JSON lines. Errors name file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import DECODER, HALF_PAIR, TABLES, JsonError, TwiceError, check_marks
from mindformers_ext.data.text_lines import decoded

LONGEST = 1 << 25  # characters of one record
NEAR_END = 16  # characters; an error closer to the end of what is read may be due to the missing rest
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One object of a file: its place among the others (from 1) and the line it begins in."""

    path: Path
    number: int
    line: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.path}, record {self.number} (line {self.line})"

    def text(self, name: str, advice: str = "") -> str:
        """The string under ``name``, or a ``UserError`` that says what is there instead, and ``advice`` where it is
        missing."""
        value = self.value.get(name)
        if isinstance(value, str):
            if value.isascii() or not HALF_PAIR.search(value):
                return value
            raise UserError(
                f"{self.where}: '{name}' holds half of a surrogate pair (\\ud800 to \\udfff); mend the text"
            )
        if name not in self.value:
            fields = ", ".join(map(repr, self.value)) or "no field"
            advice = advice or f"give every record a '{name}'"
            raise UserError(f"{self.where}: no field '{name}', it has {fields}; {advice}")
        if value is None:
            raise UserError(f"{self.where}: '{name}' is null; give it a text, or take the record out")
        raise UserError(f"{self.where}: '{name}' is {json.dumps(value)[:40]}, not a string; write it in quotes")


def read_records(
    path: Path, progress: Callable[[int], object] | None = None, place: tuple[int, int] | None = None
) -> Iterator[Record]:
    """The objects of a JSON list (``[{...}, {...}]``) or of JSON lines (one object a line), in file order.

    Only a part of the file is in memory at any time. The first character that is not blank says which of the two it is.

    Args:
        path: UTF-8, with or without a byte order mark, whatever the locale; unpacked where it ends in .gz.
        progress: is called with the bytes of each part that was read.
        place: of JSON lines, only those between these bytes, if any; records and lines are numbered from there.

    Raises:
        UserError: no such file, no record in it, not UTF-8, not JSON, an entry that is no object or holds a name twice.
    """
    scanner = _Scanner(path, decoded(path, progress, place))
    if place is not None:
        yield from (Record(path, number, *found) for number, found in enumerate(scanner.line_items(), start=1))
        return
    first = scanner.peek()
    if not first:
        raise UserError(f"{path} is empty: give a JSON list of objects, or one JSON object a line")
    if first not in "[{":
        raise scanner.error(f"found {first!r}; a JSON list begins with '[', JSON lines with '{{'")
    number = 0
    for line, value in scanner.list_items() if first == "[" else scanner.line_items():
        number += 1
        yield Record(path, number, line, value)
    if not number:
        raise UserError(f"{path} holds an empty list: give at least one record")


def _spoiled(error: Exception) -> str:
    if isinstance(error, TwiceError):
        return f"the record holds the name '{error.name}' twice; leave one"
    return (
        "the record is nested too deeply"
        if isinstance(error, RecursionError)
        else f"the record cannot be used: {error}"
    )


@dataclass
class _Scanner:
    """A window that slides over the text; ``line`` is the line of the character at ``counted``."""

    path: Path
    parts: Iterator[str]
    text: str = ""
    place: int = 0
    line: int = 1
    counted: int = 0
    ended: bool = False

    def error(self, what: str, line: int | None = None) -> UserError:
        """A ``UserError`` for the present place, or for ``line``."""
        return UserError(f"{self.path}, line {self.here() if line is None else line}: {what}")

    def here(self) -> int:
        """Number of the line in which the present place lies."""
        self.line += self.text.count("\n", self.counted, self.place)
        self.counted = self.place
        return self.line

    def more(self) -> bool:
        """Forget what is behind and read at least as much as is ahead (so long objects cost no squares)."""
        self.here()
        fresh, size = [self.text[self.place :]], 0
        self.place = self.counted = 0
        while not self.ended and size <= len(fresh[0]):
            part = next(self.parts, None)
            self.ended = part is None
            fresh.append(part or "")
            size += len(fresh[-1])
        self.text = "".join(fresh)
        return size > 0

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            found = _BLANKS.match(self.text, self.place)
            self.place = found.end() if found else self.place
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def list_items(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects between the brackets, each with its line."""
        self.place += 1
        following = self.peek()
        while following != "]":
            if following != "{":
                raise self.error(self._unexpected(following, "an object, '{...}'"))
            yield self._decode_grown()
            following = self.peek()
            if following == ",":
                self.place += 1
                following = self.peek()
                if following == "]":
                    raise self.error("found ']' after a comma; take the last comma out")
            elif following != "]":
                raise self.error(self._unexpected(following, "',' or ']' after a record"))
        self.place += 1
        if self.peek():
            raise self.error("there is text after the list's ']'; one list a file")

    def line_items(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """One object a line; blank lines are skipped."""
        while following := self.peek():
            if following != "{":
                raise self.error(self._unexpected(following, "one object a line, '{...}'"))
            yield self._decode_line()

    def _decode_line(self) -> tuple[int, dict[str, Any]]:
        end = self.text.find("\n", self.place)
        while end < 0 and self.more():
            self._check_length()
            end = self.text.find("\n", self.place)
        end = len(self.text) if end < 0 else end
        line = self.here()
        text = self.text[self.place : end]
        try:
            check_marks(text, TABLES)
            value, stop = DECODER.raw_decode(text)
        except json.JSONDecodeError as error:
            raise self.error(f"not JSON ({error.msg}, column {error.colno}); write one whole object a line") from error
        except (JsonError, RecursionError) as error:
            raise self.error(_spoiled(error)) from error
        if text[stop:].strip():
            raise self.error("there is text after the object; write one object a line")
        self.place = end
        return line, value

    def _decode_grown(self) -> tuple[int, dict[str, Any]]:
        """The object at the present place; reads on while it may only be cut off."""
        while True:
            line = self.here()
            try:
                if len(self.text) - self.place > TABLES.marks:  # shorter texts cannot hold more
                    check_marks(self.text[self.place :], TABLES)
                value, self.place = DECODER.raw_decode(self.text, self.place)
                return line, value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - NEAR_END
                if cut_off and self.more():
                    self._check_length()
                    continue
                bad = line + self.text.count("\n", self.place, error.pos)
                what = "the file ends inside a record" if cut_off and self.ended else "not JSON"
                raise self.error(f"{what} ({error.msg}); the record begins in line {line}", bad) from error
            except (JsonError, RecursionError) as error:
                raise self.error(_spoiled(error)) from error

    def _check_length(self) -> None:
        if len(self.text) > LONGEST:
            raise self.error(f"the record is longer than {LONGEST} characters; cut it into several")

    @staticmethod
    def _unexpected(found: str, wanted: str) -> str:
        return f"found {found!r}, expected {wanted}" if found else f"the file ends, expected {wanted}"
