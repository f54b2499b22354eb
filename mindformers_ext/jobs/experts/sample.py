# SPDX-License-Identifier: Apache-2.0
"""The sample of tokens that gates are fitted to while the model runs, and its parts where several processes take it.

Which tokens are in it is drawn by their places among all texts, so it is the same for any number of processes. Each
writes its part of a layer's sample beside the gates; whoever finds all parts of a layer there fits its gate.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.experts.ranks import Share

Arrays = dict[str, np.ndarray]
PREFIX = ".sample_"
_NAME = re.compile(re.escape(PREFIX) + r"(\d+)_(\d+)of\d+_[0-9a-f]*\.npz")
SLOTS = "slots"  # a part's places in the sample


@dataclass(frozen=True)
class Drawn:
    """``kept``: which of this process's tokens are in the sample, rising; ``slots``: their places in it; ``count``:
    tokens of the sample; ``there``: of all texts."""

    kept: np.ndarray
    slots: np.ndarray
    count: int
    there: int


def draw(lengths: np.ndarray, share: Share, most: int, seed: int) -> Drawn:
    """A sample of at most ``most`` tokens, each as likely as any other.

    Args:
        lengths: tokens of each row of all processes (R).
        share: every ``size``-th row from its rank on is this process's.
        most: tokens of the sample.
        seed: of the draw.
    """
    there = int(lengths.sum())
    count = min(there, most)
    places = np.sort(np.random.default_rng(seed).choice(there, count, replace=False))
    first = np.cumsum(lengths) - lengths  # place of each row's first token
    own, starts = lengths[share.rank :: share.size], first[share.rank :: share.size]
    before = np.cumsum(own) - own
    mine = np.repeat(starts - before, own) + np.arange(int(own.sum()))
    slots = np.minimum(np.searchsorted(places, mine), count - 1)
    kept = np.flatnonzero(places[slots] == mine)
    return Drawn(kept, slots[kept], count, there)


@dataclass(frozen=True)
class SampleParts:
    """The parts of a job's sample in ``folder``; ``digest`` says of which job."""

    folder: Path
    digest: str
    share: Share

    def path(self, layer: int, rank: int) -> Path:
        """One process's part of a layer's sample."""
        return self.folder / f"{PREFIX}{layer}_{rank}of{self.share.size}_{self.digest[:16]}.npz"

    def has(self, layer: int) -> bool:
        """Whether this process has written its part."""
        return self.path(layer, self.share.rank).is_file()

    def write(self, layer: int, arrays: Arrays) -> None:
        """This process's part: rows of arrays, and in ``SLOTS`` where they stand in the sample."""
        named: dict[str, Any] = arrays
        with fresh_file(self.path(layer, self.share.rank), overwrite=True) as beside, beside.open("wb") as file:
            np.savez(file, **named)

    def drop(self, layer: int) -> None:
        """Delete this process's part."""
        self.path(layer, self.share.rank).unlink(missing_ok=True)

    def drop_old(self, anew: bool) -> None:
        """Delete what this process, or one that is no more, wrote for other jobs; ``anew``: for this one, too."""
        for path in self.folder.glob(f"{PREFIX}*.npz"):
            found = _NAME.fullmatch(path.name)
            if found is None or int(found[2]) % self.share.size != self.share.rank:
                continue
            if anew or path != self.path(int(found[1]), self.share.rank):
                path.unlink(missing_ok=True)

    @contextmanager
    def whole(self, layer: int) -> Iterator[bool]:
        """Whether all parts of a layer are there; no other process is told so meanwhile. Behind it they are gone."""
        paths = [self.path(layer, rank) for rank in range(self.share.size)]
        held = _held(paths[0]) if all(path.is_file() for path in paths) else None
        if held is None:
            yield False
            return
        try:
            yield True
            for path in paths:
                path.unlink(missing_ok=True)
        finally:
            os.close(held)

    def joined(self, layer: int, count: int) -> Arrays:
        """The sample of a layer out of all parts, one of them in memory at a time.

        Raises:
            UserError: a part is damaged, or they are not the sample.
        """
        result: Arrays = {}
        filled = np.zeros(count, bool)
        for rank in range(self.share.size):
            path = self.path(layer, rank)
            try:
                with np.load(path, allow_pickle=False) as part:
                    slots = part[SLOTS]
                    for name in (name for name in part.files if name != SLOTS):
                        rows = part[name]
                        whole = result.setdefault(name, np.empty((count, *rows.shape[1:]), rows.dtype))
                        whole[slots] = rows
                    filled[slots] = True
            except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
                raise UserError(f"'{path}' is damaged ({error}): start again with --overwrite") from error
        if not filled.all():
            raise UserError(f"'{self.folder}' lacks tokens of layer {layer}: start again with --overwrite")
        return result


def _held(path: Path) -> int | None:
    """The descriptor that locks the file; None where another process has it, or has removed it."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held
