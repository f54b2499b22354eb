# SPDX-License-Identifier: Apache-2.0
"""What enters each layer, on disk: files of float32 (rows, S, D), read and written a few rows at a time.

Plain reads and writes, no mapping: pages of a mapped file would count as this process's memory.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import finalize

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.blocks import open_new

STATE = "state.json"


class StateFile:
    """One file of (rows, S, D) float32."""

    def __init__(self, path: Path, length: int, width: int) -> None:
        self._path, self._length, self._width = path, length, width
        if not path.exists():
            open_new(path).close()
        self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def read(self, rows: range, length: int) -> np.ndarray:
        """(rows, length, D) of the rows' first ``length`` tokens."""
        found = np.empty((len(rows), length, self._width), np.float32)
        for place, row in enumerate(rows):
            view = found[place].reshape(-1).view(np.uint8).data
            if os.preadv(self._file, [view], self._place(row)) != len(view):
                raise UserError(f"'{self._path}' is shorter than it was written: start again with --overwrite")
        return found

    def write(self, rows: range, states: np.ndarray) -> None:
        """Put (rows, tokens, D) at the rows' beginnings."""
        for row, state in zip(rows, states, strict=True):
            data = np.ascontiguousarray(state, np.float32).reshape(-1).view(np.uint8).data
            done = 0
            while done < len(data):
                try:
                    done += os.pwrite(self._file, data[done:], self._place(row) + done)
                except OSError as error:  # knows no name
                    raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _place(self, row: int) -> int:
        return row * self._length * self._width * 4


class Inputs(Protocol):
    """What enters the layers of a pass, by layer."""

    def input_of(self, layer: int) -> StateFile:
        """What enters a layer; of the number behind the last one, what enters the head."""


@dataclass(frozen=True)
class Stream:
    """Two files of one way through the layers, which take turns, in a folder that somebody else holds and removes."""

    folder: Path
    name: str
    length: int
    width: int

    def input_of(self, layer: int) -> StateFile:
        """See ``Inputs``."""
        return StateFile(self.folder / f"{self.name}_{layer % 2}.f32", self.length, self.width)


class States:
    """The files of one pass in a folder of its own, and how far it has come.

    ``keep``: a file for each layer's input, for the way back; else two files take turns. ``digest`` says which pass:
    what another one left is no start for this one. ``anew``: nor is what this one left. One process at a time is at
    work in a folder.

    Raises:
        UserError: another process is.
    """

    def __init__(self, folder: Path, length: int, width: int, digest: str, keep: bool, anew: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._release = finalize(self, os.close, _hold(folder))
        if anew:
            (folder / STATE).unlink(missing_ok=True)
        self.folder, self._length, self._width, self._digest, self._keep = folder, length, width, digest, keep
        self._done = self._read()

    def done(self, what: str) -> int:
        """How many steps of ``what`` ("forward", "backward") an earlier run of the same pass has finished."""
        return self._done.get(what, 0)

    def finish(self, what: str, steps: int) -> None:
        """So many are finished; what they wrote is on the disk."""
        self._done[what] = steps
        write_text(self.folder / STATE, json.dumps({"digest": self._digest, "done": self._done}) + "\n")

    def input_of(self, layer: int) -> StateFile:
        """What enters a layer; of the number behind the last one, what enters the head."""
        return self._open(f"states_{layer if self._keep else layer % 2}")

    def gradient_of(self, layer: int) -> StateFile:
        """The gradient at the same place."""
        return self._open(f"gradients_{layer % 2}")

    def remove(self) -> None:
        """Delete all files."""
        _delete(self.folder)
        self._release()

    def _open(self, name: str) -> StateFile:
        return StateFile(self.folder / f"{name}.f32", self._length, self._width)

    def _read(self) -> dict[str, int]:
        path = self.folder / STATE
        if not path.is_file():
            return {}
        found = read_object(path)
        if found.get("digest") != self._digest:
            path.unlink()
            return {}
        done = found.get("done")
        return {str(key): int(value) for key, value in done.items()} if isinstance(done, dict) else {}


def remove_left(folder: Path) -> None:
    """Delete what a run left that was killed when all it was to make was there.

    Raises:
        UserError: another process is at work there.
    """
    if folder.is_dir() and not folder.is_symlink():
        held = _hold(folder)
        try:
            _delete(folder)
        finally:
            os.close(held)


def _hold(folder: Path) -> int:
    """The descriptor that locks the folder."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise UserError(
            f"another process is at work in '{folder.parent}': wait for it, or choose another --save_path"
        ) from error
    return held


def _delete(folder: Path) -> None:
    """Delete the folder; how far its pass has come is gone first."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != STATE):
        path.unlink()
    folder.rmdir()
