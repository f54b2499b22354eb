# SPDX-License-Identifier: Apache-2.0
"""The few pieces of protobuf's wire format that a checkpoint needs (protobuf.dev, "Encoding")."""

from __future__ import annotations

from collections.abc import Mapping

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.blocks import OpenFile

VARINT, BYTES = 0, 2
LONGEST = 10  # bytes of a number of 64 bits
MAX_INT64 = 2**63 - 1
WINDOW = 4096


class Cursor:
    """A position inside one message of a file. Nothing is read past the message's end, data is skipped, not read."""

    def __init__(self, file: OpenFile, position: int, end: int, what: str) -> None:
        """Bytes ``position`` to ``end``; ``what`` names the message in errors."""
        self.file, self.position, self.end, self.what = file, position, end, what
        self._window, self._window_at = b"", 0

    def fault(self, found: str) -> UserError:
        """The error for what was found here."""
        return UserError(
            f"'{self.file.path}' is not a whole MindSpore checkpoint: at byte {self.position} {self.what} {found}. "
            "It may be cut, damaged, encrypted or of another kind; copy it again"
        )

    def varint(self) -> int:
        """The next number; negative ones (which no size is) are refused."""
        self._look()
        at = self.position - self._window_at
        try:
            value, behind = read_varint(self._window, at, min(len(self._window), self.end - self._window_at))
        except VarintError as error:
            raise self.fault(str(error)) from None
        if value > MAX_INT64:
            raise self.fault("has a number out of range")
        self.position += behind - at
        return value

    def key(self) -> tuple[int, int]:
        """Field number and wire type."""
        value = self.varint()
        return value >> 3, value & 7

    def inside(self) -> Cursor:
        """A cursor over the bytes field that starts here; this one moves behind it."""
        length = self.varint()
        if length > self.end - self.position:
            raise self.fault(f"promises {length} bytes, {self.end - self.position} are left")
        inner = Cursor(self.file, self.position, self.position + length, self.what)
        inner._window, inner._window_at = self._window, self._window_at
        self.position += length
        return inner

    def message(self, allowed: Mapping[int, int], what: str) -> tuple[int, Cursor]:
        """The next field's number and a cursor inside it; only fields of ``allowed`` (number -> wire type) pass."""
        number, wire = self.key()
        if allowed.get(number) != wire:
            raise self.fault(f"has an unknown field {number} of wire type {wire}")
        inner = self.inside()
        inner.what = what
        return number, inner

    def text(self, limit: int) -> str:
        """All bytes of this field as UTF-8."""
        length = self.end - self.position
        raw = self.file.bytes_at(self.position, length) if length <= limit else b"\xff"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"has a name of {length} bytes that is not text") from None

    def _look(self) -> None:
        """Have the bytes of a whole number in the window, where the file has them."""
        if not 0 <= self.position - self._window_at <= len(self._window) - LONGEST:
            self._window, self._window_at = self.file.bytes_at(self.position, WINDOW), self.position


class VarintError(ValueError):
    """What is wrong with a number, as the end of a sentence about the message that holds it."""


def read_varint(data: bytes, at: int, end: int | None = None) -> tuple[int, int]:
    """The number that starts at byte ``at`` of ``data``, as written by ``varint``, and the place behind it.

    Raises:
        VarintError: it does not end before ``end`` (None: where the data ends), or has more than ten bytes.
    """
    end = len(data) if end is None else end
    result = 0
    for place, byte in enumerate(data[at : min(at + LONGEST, end)]):
        result |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return result, at + place + 1
    raise VarintError("has a number out of range" if end - at >= LONGEST else "ends in the middle of a number")


def varint(value: int) -> bytes:
    """A number >= 0, 7 bits to a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varint_field(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3 | VARINT) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return varint(number << 3 | BYTES) + varint(len(value)) + value
