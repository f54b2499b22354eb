# SPDX-License-Identifier: Apache-2.0
"""What the parts of a corpus hold, read without their token ids, and what every split gets of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mindformers_ext.data.domains.duplicates import SeenSketches
from mindformers_ext.data.domains.filters import DUPLICATES
from mindformers_ext.data.domains.manifest import SPLITS
from mindformers_ext.data.domains.splits import SHIFT, SLOTS, Amount, Range, deal
from mindformers_ext.data.packing import Packer
from mindformers_ext.formats.frames import Frame, read_frames

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]
Counts = Mapping[str, npt.NDArray[np.int64]]
Place = tuple[str, int, int]  # domain, part, frame
Tell = Callable[[int], object]


@dataclass(frozen=True)
class Share:
    """What a domain gives to a split: documents of a range of slots but those in ``taken``, which earlier splits have
    from other domains. They hold ``tokens``, of which ``rows`` rows are written."""

    range: Range
    taken: Hashes
    tokens: int
    documents: int
    rows: int

    def has(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which documents belong to it."""
        slots = slots_of(hashes)
        return (slots >= self.range.start) & (slots < self.range.end) & ~is_in(hashes, self.taken)


class Survey:
    """What the parts of all domains hold: tokens and documents by slot, counts, and which documents are duplicates."""

    def __init__(self, parts: Mapping[str, Sequence[Path]], likeness: float | None, tell: Tell) -> None:
        """Read every part but its token ids. ``likeness``: from which on a document is a duplicate."""
        self.parts = parts
        self.tokens = {name: np.zeros(SLOTS, np.int64) for name in parts}
        self.documents = {name: np.zeros(SLOTS, np.int64) for name in parts}
        self.read = dict.fromkeys(parts, 0)
        self.filtered = {name: Counter[str]() for name in parts}
        self._copies: dict[Place, np.ndarray] = {}  # by domain, part and frame: bits of the kept ones
        seen = SeenSketches(likeness) if likeness is not None else None
        for name in parts:
            for place, frame in self._frames(name):
                if frame.last:
                    self._count(name, frame)
                    continue
                kept = np.ones(len(frame.read("tokens")), bool)
                if seen is not None:
                    kept[:] = [seen.is_new(sketch) for sketch in frame.read("sketch")]
                    if not kept.all():
                        self._copies[place] = np.packbits(kept)
                        self.filtered[name][DUPLICATES] += int((~kept).sum())
                slots = slots_of(frame.read("hash"))[kept]
                self.tokens[name] += np.bincount(slots, frame.read("tokens")[kept], SLOTS).astype(np.int64)
                self.documents[name] += np.bincount(slots, minlength=SLOTS)
                tell(int(kept.size))

    def rows(self, name: str, share: Share, seq_length: int) -> Iterator[Ids]:
        """The rows (n, seq_length) that a domain's documents fill in a split, in the order of its files."""
        packer = Packer(seq_length)
        for _, frame, kept in self._kept(name):
            chosen = kept & share.has(frame.read("hash"))
            if chosen.any():
                ids = frame.read("ids")
                yield packer.add(ids[np.repeat(chosen, frame.read("tokens"))].astype(np.int32))

    def hashes(self, shares: Mapping[str, Share], low: int, high: int) -> Hashes:
        """The documents of a split in slots ``low`` to before ``high``, of all domains; sorted."""
        found = [np.empty(0, np.uint64)]
        for name, share in shares.items():
            for _, frame, kept in self._kept(name):
                hashes = frame.read("hash")
                slots = slots_of(hashes)
                found.append(hashes[kept & (slots >= low) & (slots < high) & share.has(hashes)])
        return np.unique(np.concatenate(found))

    def without(self, taken: Hashes, starts: Mapping[str, int]) -> tuple[Counts, Counts]:
        """Tokens and documents by slot of each domain, from its start on without those in ``taken``."""
        tokens, documents = (
            {name: count.copy() for name, count in all.items()} for all in (self.tokens, self.documents)
        )
        for name in self.parts if len(taken) else ():
            for _, frame, kept in self._kept(name):
                hashes = frame.read("hash")
                slots = slots_of(hashes)
                out = kept & (slots >= starts[name]) & is_in(hashes, taken)
                tokens[name] -= np.bincount(slots[out], frame.read("tokens")[out], SLOTS).astype(np.int64)
                documents[name] -= np.bincount(slots[out], minlength=SLOTS)
        return tokens, documents

    def _kept(self, name: str) -> Iterator[tuple[Place, Frame, npt.NDArray[np.bool_]]]:
        """The frames of a domain, and which of their documents are no duplicates."""
        for place, frame in self._frames(name):
            if not frame.last:
                kept = np.ones(len(frame.read("hash")), bool)
                if place in self._copies:
                    kept = np.unpackbits(self._copies[place], count=len(kept)).astype(bool)
                yield place, frame, kept

    def _frames(self, name: str) -> Iterator[tuple[Place, Frame]]:
        for number, path in enumerate(self.parts[name]):
            for at, frame in enumerate(read_frames(path)):
                yield (name, number, at), frame

    def _count(self, name: str, frame: Frame) -> None:
        self.read[name] += int(frame.facts["documents"])
        self.filtered[name].update(frame.facts["filtered"])


def share_out(survey: Survey, amounts: Mapping[str, Amount], seq_length: int) -> dict[str, dict[str, Share]]:
    """What every domain gives to every split; no document is in two, nor a copy of it in another domain.

    Raises:
        UserError: a domain has not as many rows as are asked of it.
    """
    result: dict[str, dict[str, Share]] = {}
    starts = dict.fromkeys(survey.parts, 0)
    taken: Hashes = np.empty(0, np.uint64)
    tokens: Counts = survey.tokens
    documents: Counts = survey.documents
    for split in SPLITS:
        result[split] = {}
        for name, found in deal(split, amounts[split], tokens, starts, seq_length).items():
            held = int(tokens[name][found.start : found.end].sum())
            rows = held // seq_length if found.rows is None else found.rows
            count = int(documents[name][found.start : found.end].sum())
            result[split][name] = Share(found, taken, held, count, rows)
            starts[name] = found.end
        low, high = min(starts.values()), max(starts.values())
        if split != SPLITS[-1] and low < high:  # slots that one domain has given away and another has not
            taken = np.union1d(taken, survey.hashes(result[split], low, high))
            tokens, documents = survey.without(taken, starts)
    return result


def slots_of(hashes: Hashes) -> npt.NDArray[np.int64]:
    """The slots of documents."""
    return (hashes >> np.uint64(SHIFT)).astype(np.int64)


def is_in(hashes: Hashes, taken: Hashes) -> npt.NDArray[np.bool_]:
    """Which ``hashes`` are among the sorted ``taken``."""
    if not len(taken):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(taken, hashes), len(taken) - 1)
    return taken[at] == hashes
