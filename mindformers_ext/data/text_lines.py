# SPDX-License-Identifier: Apache-2.0
"""The one reader of text files: UTF-8, a byte order mark taken off, ``.gz`` unpacked, lines ended by line ends alone.

A line ends with ``\\n``, ``\\r\\n`` or ``\\r``. ``str.splitlines`` also cuts at form feeds, U+0085 and U+2028, which
are characters of a text; so nothing that reads a user's text calls it.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mindformers_ext.core.errors import UserError

CHUNK = 1 << 20  # bytes read at once
PACKED = ".gz"


def lines_of(text: str) -> list[str]:
    """The lines of ``text`` without their ends; a blank line is a line, what follows the last line end is none."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; a ``UserError`` names the line that is not UTF-8."""
    return lines_of("".join(decoded(path)))


def decode_lines(data: bytes, where: str) -> list[str]:
    """The lines of ``data``, which came from ``where``."""
    try:
        return lines_of(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, 1 + data.count(b"\n", 0, error.start), error) from error


def decoded(
    path: Path, progress: Callable[[int], object] | None = None, place: tuple[int, int] | None = None
) -> Iterator[str]:
    """The file's text in parts, line ends as they are; ``progress`` gets the bytes of the file that each part took.

    ``place``: only the bytes from its first to before its second number, both at the start of a line.

    Raises:
        UserError: the file cannot be read, is not UTF-8 (the line is named), or is damaged gzip.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        for chunk in chunks(path, progress, place):
            text = decoder.decode(chunk)
            line += text.count("\n")
            yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), line + bytes(error.object[: error.start]).count(b"\n"), error) from error


def chunks(
    path: Path, progress: Callable[[int], object] | None = None, place: tuple[int, int] | None = None
) -> Iterator[bytes]:
    """The file's bytes in parts, unpacked where its name ends in .gz; the rest as for ``decoded``."""
    start, end = place or (0, 0)
    try:
        with path.open("rb") as file, _unpacked(file, path.suffix == PACKED) as stream:
            file.seek(start)
            while chunk := stream.read(CHUNK if place is None else min(CHUNK, end - start)):
                if progress:
                    progress(file.tell() - start)
                start = file.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds: that before .gz."""
    return path.with_suffix("").suffix if path.suffix == PACKED else path.suffix


@contextmanager
def _unpacked(file: IO[bytes], packed: bool) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if not packed:
        yield file
        return
    with gzip.GzipFile(fileobj=file) as stream:
        yield stream


def _not_utf8(where: str, line: int, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{where}, line {line}: not UTF-8 ({error.reason}); convert it, for example with iconv")
