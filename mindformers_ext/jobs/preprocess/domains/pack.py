# SPDX-License-Identifier: Apache-2.0
"""Parts packed into rows: duplicates out, documents dealt to splits, tokens cut into rows, one file after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.domains.duplicates import SeenSketches
from mindformers_ext.data.domains.filters import DUPLICATES
from mindformers_ext.data.domains.manifest import SPLITS, DomainCounts, DomainFiles, RecordFile
from mindformers_ext.data.domains.splits import SHIFT, SLOTS, Amount, Range, deal
from mindformers_ext.data.packing import Packer
from mindformers_ext.formats.atomic import flush
from mindformers_ext.formats.frames import Frame, read_frames
from mindformers_ext.jobs.engine.door import open_record_writer
from mindformers_ext.jobs.engine.protocols import RecordWriter

FILE_BYTES = 4 << 30  # of token ids in one file: a domain with more has several
BLOCK_TOKENS = 1 << 18  # handed to the writer at once
NUMBERS = {"set": "int32", "idx": "int64"}
Ids = npt.NDArray[np.int32]
Tell = Callable[[int], object]


class Survey:
    """What the parts of all domains hold: tokens and documents by slot, counts, and which documents are duplicates."""

    def __init__(self, parts: Mapping[str, Sequence[Path]], likeness: float | None, tell: Tell) -> None:
        """Read every part but its token ids. ``likeness``: from which on a document is a duplicate."""
        self.parts = parts
        self.tokens = {name: np.zeros(SLOTS, np.int64) for name in parts}
        self.documents = {name: np.zeros(SLOTS, np.int64) for name in parts}
        self.read = dict.fromkeys(parts, 0)
        self.filtered = {name: Counter[str]() for name in parts}
        self._copies: dict[tuple[str, int, int], np.ndarray] = {}  # by domain, part and frame: bits of the kept ones
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
                slots = _slots(frame)[kept]
                self.tokens[name] += np.bincount(slots, frame.read("tokens")[kept], SLOTS).astype(np.int64)
                self.documents[name] += np.bincount(slots, minlength=SLOTS)
                tell(int(kept.size))

    def rows(self, name: str, place: Range, seq_length: int) -> Iterator[Ids]:
        """The rows (n, seq_length) that a domain's documents in a range of slots fill, in the order of its files."""
        packer = Packer(seq_length)
        for at, frame in self._frames(name):
            if frame.last:
                continue
            slots = _slots(frame)
            chosen = (slots >= place.start) & (slots < place.end)
            if at in self._copies:
                chosen &= np.unpackbits(self._copies[at], count=len(slots)).astype(bool)
            if chosen.any():
                ids = frame.read("ids")
                yield packer.add(ids[np.repeat(chosen, frame.read("tokens"))].astype(np.int32))

    def _frames(self, name: str) -> Iterator[tuple[tuple[str, int, int], Frame]]:
        for number, path in enumerate(self.parts[name]):
            for at, frame in enumerate(read_frames(path)):
                yield (name, number, at), frame

    def _count(self, name: str, frame: Frame) -> None:
        self.read[name] += int(frame.facts["documents"])
        self.filtered[name].update(frame.facts["filtered"])


def _slots(frame: Frame) -> npt.NDArray[np.int64]:
    return (frame.read("hash") >> np.uint64(SHIFT)).astype(np.int64)


@dataclass(frozen=True)
class Packed:
    """What was written."""

    splits: Mapping[str, Mapping[str, DomainFiles]]
    counts: Mapping[str, DomainCounts]


def pack(survey: Survey, amounts: Mapping[str, Amount], seq_length: int, folder: Path, tell: Tell) -> Packed:
    """Write the files of every split and domain into ``folder``; ``tell`` is told the rows.

    Raises:
        UserError: a domain has not what is asked of it, or no row at all.
    """
    ranges = deal(survey.tokens, amounts, seq_length)
    used = {
        split: {name: int(survey.tokens[name][found.start : found.end].sum()) for name, found in by_name.items()}
        for split, by_name in ranges.items()
    }
    wanted = {
        split: {name: min(used[split][name] // seq_length, _most(found)) for name, found in by_name.items()}
        for split, by_name in ranges.items()
    }
    if not any(rows for by_name in wanted.values() for rows in by_name.values()):
        raise UserError(
            f"the documents fill not one row of {seq_length} tokens: give more text, or a smaller --seq_length"
        )
    with DomainWriter(folder, seq_length) as writer:
        splits = {}
        for split in SPLITS:
            splits[split] = {
                name: writer.write(split, name, number, survey.rows(name, found, seq_length), wanted[split][name], tell)
                for number, (name, found) in enumerate(ranges[split].items())
            }
    counts = {}
    full = {
        split: {name: found.rows is not None for name, found in by_name.items()} for split, by_name in ranges.items()
    }
    for name, tokens in survey.tokens.items():
        # what a full split leaves of its last documents is not used; else what fills no row is dropped
        taken = sum(wanted[split][name] * seq_length if full[split][name] else used[split][name] for split in SPLITS)
        documents = sum(
            int(survey.documents[name][found[name].start : found[name].end].sum()) for found in ranges.values()
        )
        counts[name] = DomainCounts(
            documents=survey.read[name],
            filtered=dict(sorted(survey.filtered[name].items())),
            tokens=taken,
            dropped_tokens=taken - sum(splits[split][name].rows for split in SPLITS) * seq_length,
            unused_documents=int(survey.documents[name].sum()) - documents,
            unused_tokens=int(tokens.sum()) - taken,
        )
    return Packed(splits, counts)


def _most(found: Range) -> int:
    return 2**62 if found.rows is None else found.rows


class DomainWriter:
    """Writes files of rows with their domain and number, all in one process beside this one."""

    def __init__(self, folder: Path, seq_length: int) -> None:
        """Below ``folder``, which exists."""
        self.folder, self.seq_length = folder, seq_length
        self._writer: RecordWriter | None = None

    def __enter__(self) -> DomainWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.abort()  # every file that is whole is finished by now

    def write(self, split: str, name: str, number: int, rows: Iterable[Ids], count: int, tell: Tell) -> DomainFiles:
        """The first ``count`` of ``rows`` as files of domain ``number``. The bytes do not depend on how rows come."""
        place = self.folder / split
        place.mkdir(exist_ok=True)
        if not count:
            return DomainFiles()
        per_file = max(1, FILE_BYTES // (4 * self.seq_length))
        blocks = _blocks(rows, count, per_file, max(1, BLOCK_TOKENS // self.seq_length))
        at, written = 0, []
        for path in (place / file_name for file_name in _names(name, -(-count // per_file))):
            writer, end = self._begin(path), min(at + per_file, count)
            left = end - at
            while at < end:
                block = next(blocks)
                numbers = {"set": np.full(len(block), number, np.int32), "idx": np.arange(at, at + len(block))}
                writer.write({"input_ids": block, **numbers})
                at += len(block)
                tell(len(block))
            writer.finish()
            written.append(RecordFile(path.name, left, *_flushed(path)))
        return DomainFiles(tuple(written))

    def _begin(self, path: Path) -> RecordWriter:
        if self._writer is None:
            self._writer = open_record_writer(path, ("input_ids",), 1, self.seq_length, NUMBERS)
        else:
            self._writer.begin(path)
        return self._writer


def _names(domain: str, files: int) -> list[str]:
    if files == 1:
        return [f"{domain}.mindrecord"]
    return [f"{domain}-{number:05}-of-{files:05}.mindrecord" for number in range(files)]


def _blocks(rows: Iterable[Ids], count: int, per_file: int, size: int) -> Iterator[Ids]:
    """``count`` rows in blocks of ``size``, a new one with each file."""
    waiting: list[Ids] = []
    have, done = 0, 0
    for part in rows:
        waiting.append(part)
        have += len(part)
        while done < count and have >= (wanted := min(size, per_file - done % per_file, count - done)):
            whole = np.concatenate(waiting)
            yield whole[:wanted]
            waiting, have, done = [whole[wanted:]], have - wanted, done + wanted
        if done == count:
            return
    if done < count:
        raise UserError("parts of the corpus have changed while they were packed: run the same command again")


def _flushed(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file that is on the disk, with its index."""
    flush(path)
    flush(path.with_name(path.name + ".db"))
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return path.stat().st_size, digest.hexdigest()
