# SPDX-License-Identifier: Apache-2.0
"""Files of frames: small facts and arrays, one after the other, written and read in bounded memory.

They carry encoded text from the processes or machines that made it to the one that packs it. A line of text names the
format; frames follow, each the length of a JSON text (4 bytes, little endian), the text, and its arrays' bytes (little
endian) in the order in which the text lists them. The last frame has no arrays and ``"end": true``: a file without it
is not whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import Bounds, JsonError, parse_json

HEAD = b"mindformers_ext frames 1\n"
KINDS = ("uint8", "uint16", "int32", "uint32", "int64", "uint64")
FACTS = Bounds(1 << 20, 10_000)  # bytes of a frame's text
MOST_ARRAYS = 16  # of a frame
Arrays = Mapping[str, npt.NDArray[Any]]


class FrameWriter:
    """Writes a file of frames; leaving the block without an error ends it."""

    def __init__(self, path: Path) -> None:
        """Begin the file at ``path``."""
        self._file = path.open("wb")
        self._file.write(HEAD)
        self.ending: dict[str, Any] = {}

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._write({**self.ending, "end": True}, {})
        self._file.close()

    def add(self, facts: Mapping[str, Any], arrays: Arrays) -> None:
        """Append a frame. ``facts``: JSON values by name."""
        self._write({**facts, "end": False}, arrays)

    def _write(self, facts: Mapping[str, Any], arrays: Arrays) -> None:
        listed = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
        text = json.dumps({"facts": facts, "arrays": listed}).encode()
        self._file.write(len(text).to_bytes(4, "little") + text)
        for array in arrays.values():
            self._file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


@dataclass(frozen=True)
class Frame:
    """A frame: its facts, and arrays that are read when they are asked for. ``last``: the end of the file."""

    facts: Mapping[str, Any]
    last: bool
    _descriptor: int
    _places: Mapping[str, tuple[int, np.dtype[Any], tuple[int, ...]]]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The array ``name``."""
        at, kind, shape = self._places[name]
        data = os.pread(self._descriptor, math.prod(shape) * kind.itemsize, at)
        return np.frombuffer(data, kind.newbyteorder("<")).reshape(shape)

    def __contains__(self, name: str) -> bool:
        return name in self._places


def read_frames(path: Path) -> Generator[Frame, None, None]:
    """The frames of ``path`` with the end; a frame's arrays are there until the next one is asked for.

    Raises:
        UserError: no such file, another kind of file, or one that is not whole.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(HEAD)) != HEAD:
                raise UserError(f"'{path}' is not a part that llama_preprocess.py wrote: remove it and run again")
            last = False
            while not last:
                frame, following = _frame(path, file.read(4), file.fileno(), file.tell(), size)
                last = frame.last
                yield frame
                file.seek(following)
            if following != size:
                raise _damaged(path, f"{size - following} bytes follow its end")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def _frame(path: Path, head: bytes, descriptor: int, at: int, size: int) -> tuple[Frame, int]:
    """The frame whose text begins at ``at``, and where the next one begins."""
    length = int.from_bytes(head, "little")
    if len(head) < 4 or at + length > size:
        raise _damaged(path, "it ends inside a frame")
    try:
        value = parse_json(os.pread(descriptor, length, at), FACTS)
        facts, places, at = dict(value["facts"]), {}, at + length
        for name, kind, shape in value["arrays"]:
            if kind not in KINDS or len(shape) > 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise JsonError(f"an array of {kind!r:.20} and shape {shape!r:.40}")
            places[str(name)] = at, np.dtype(kind), tuple(shape)
            at += math.prod(shape) * np.dtype(kind).itemsize
        if len(places) > MOST_ARRAYS or at > size:
            raise JsonError("arrays beyond its end")
        return Frame(facts, facts["end"] is True, descriptor, places), at
    except (JsonError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"'{path}' is damaged ({what}): remove it and run the command that wrote it again")
