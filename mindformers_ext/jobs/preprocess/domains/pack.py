# SPDX-License-Identifier: Apache-2.0
"""Parts packed into rows: duplicates out, documents dealt to splits, tokens cut into rows, one file after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.domains.manifest import SPLITS, DomainCounts, DomainFiles, RecordFile
from mindformers_ext.data.domains.splits import Amount
from mindformers_ext.formats.atomic import flush
from mindformers_ext.jobs.engine.door import open_record_writer
from mindformers_ext.jobs.engine.protocols import RecordWriter
from mindformers_ext.jobs.preprocess.domains.survey import Ids, Survey, Tell, share_out

FILE_BYTES = 4 << 30  # of token ids in one file: a domain with more has several
BLOCK_TOKENS = 1 << 18  # handed to the writer at once
NUMBERS = {"set": "int32", "idx": "int64"}


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
    shares = share_out(survey, amounts, seq_length)
    if not any(share.rows for by_name in shares.values() for share in by_name.values()):
        raise UserError(
            f"the documents fill not one row of {seq_length} tokens: give more text, or a smaller --seq_length"
        )
    splits: dict[str, dict[str, DomainFiles]] = {}
    with DomainWriter(folder, seq_length) as writer:
        for split in SPLITS:
            splits[split] = {
                name: writer.write(split, name, number, survey.rows(name, share, seq_length), share.rows, tell)
                for number, (name, share) in enumerate(shares[split].items())
            }
    counts = {}
    for name, tokens in survey.tokens.items():
        own = [shares[split][name] for split in SPLITS]
        # what a full split leaves of its last documents is not used; else what fills no row is dropped
        taken = sum(share.tokens if share.range.rows is None else share.rows * seq_length for share in own)
        counts[name] = DomainCounts(
            documents=survey.read[name],
            filtered=dict(sorted(survey.filtered[name].items())),
            tokens=taken,
            dropped_tokens=taken - sum(share.rows for share in own) * seq_length,
            unused_documents=int(survey.documents[name].sum()) - sum(share.documents for share in own),
            unused_tokens=int(tokens.sum()) - taken,
        )
    return Packed(splits, counts)


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
            end, first = min(at + per_file, count), next(blocks)  # a fault of the rows shows before a process starts
            writer, start = self._begin(path), at
            for block in chain([first], blocks):
                numbers = {"set": np.full(len(block), number, np.int32), "idx": np.arange(at, at + len(block))}
                writer.write({"input_ids": block, **numbers})
                at += len(block)
                tell(len(block))
                if at == end:
                    break
            writer.finish()
            written.append(RecordFile(path.name, end - start, *_flushed(path)))
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
