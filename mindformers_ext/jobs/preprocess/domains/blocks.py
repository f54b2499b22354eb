# SPDX-License-Identifier: Apache-2.0
"""One block of a corpus encoded into a part: a file of frames that the packing reads. Runs in any process or machine.

A frame holds some documents: ``hash`` (uint64) and ``tokens`` (uint32) of each, their ``ids`` one after the other
(uint16 where the vocabulary allows it), and ``sketch`` where duplicates are looked for. The end holds what was counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.conversations import Specials
from mindformers_ext.data.domains.documents import Block, block_bytes, document_of, read_block, score_of, whole_error
from mindformers_ext.data.domains.duplicates import Sketcher
from mindformers_ext.data.domains.filters import DUPLICATES, EMPTY, TOKENS, Filter
from mindformers_ext.data.domains.splits import document_hash
from mindformers_ext.data.json_records import Record
from mindformers_ext.data.packing import check_ids
from mindformers_ext.data.readers import Cutting, cut
from mindformers_ext.data.tokenizers import Tokenizer, puts_blank
from mindformers_ext.formats.atomic import shared_file
from mindformers_ext.formats.frames import FrameWriter
from mindformers_ext.jobs.preprocess.encode import fragment_ids

BATCH_CHARACTERS = 1 << 17  # of text that is encoded at once
VERSION = 1  # of what a part holds


@dataclass(frozen=True)
class BlockSetup:
    """What a process needs to encode blocks, and what makes a part the same."""

    tokenizer: Tokenizer
    tokenizer_sha256: str
    special: Specials
    vocab_size: int
    domains: tuple[str, ...]
    field: str | None
    filters: tuple[Filter, ...]
    seed: int
    parts: Path

    def own_filters(self, domain: int) -> tuple[Filter, ...]:
        """The filters of a domain, in the order in which they were asked for."""
        return tuple(item for item in self.filters if item.domain in (None, self.domains[domain]))

    def part_of(self, block: Block) -> Path:
        """The part of a block: its name follows from all that it is made of, so one of other options or of a file that
        was changed is another."""
        state = block.path.stat()
        filters = [
            [item.kind, item.low, item.high] for item in self.own_filters(block.domain) if item.kind != DUPLICATES
        ]
        made_of = [
            *(
                VERSION,
                self.tokenizer_sha256,
                self.special.bos,
                self.special.eos,
                self.vocab_size,
                self.field,
                self.seed,
            ),
            *(filters, any(item.kind == DUPLICATES for item in self.filters)),
            *(self.domains[block.domain], str(block.path), block.start, block.end, state.st_size, state.st_mtime_ns),
        ]
        return self.parts / f"{sha256(json.dumps(made_of).encode()).hexdigest()[:32]}.part"


class _Document(NamedTuple):
    content: Any  # text or ids
    record: Record


class BlockEncoder:
    """Encodes blocks with one tokenizer."""

    def __init__(self, setup: BlockSetup) -> None:
        """``setup`` is for every block."""
        self.setup = setup
        self.cutting = Cutting(blank=puts_blank(setup.tokenizer))
        self.dtype = np.dtype("uint16" if setup.vocab_size <= 1 << 16 else "int32")
        self.sketcher = Sketcher() if any(item.kind == DUPLICATES for item in setup.filters) else None

    def encode(self, block: Block) -> int:
        """Write the part of ``block``; returns the bytes that were read.

        Raises:
            UserError: a record that does not fit; file and line are named.
        """
        counts = {"documents": 0, "filtered": Counter[str]()}
        try:
            with shared_file(self.setup.part_of(block)) as path, FrameWriter(path) as writer:
                for batch in self._batches(block, counts):
                    self._write(batch, block.domain, writer, counts)
                writer.ending.update(counts)
        except UserError as error:
            raise whole_error(block, error, self.setup.field) from error
        return block_bytes(block)

    def _batches(self, block: Block, counts: dict[str, Any]) -> Iterator[list[_Document]]:
        """Documents that the filters of text and fields keep, some at a time."""
        batch, size = [], 0
        filters = [item for item in self.setup.own_filters(block.domain) if item.text_score or item.field]
        more = tuple(item.field for item in filters if item.field)
        for record in read_block(block, self.setup.field, more):
            counts["documents"] += 1
            content = document_of(record, self.setup.field)
            refused = self._refused(record, content, filters)
            if refused is not None:
                counts["filtered"][refused] += 1
                continue
            batch.append(_Document(content, record))
            size += len(content) + 1
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _refused(self, record: Record, content: Any, filters: list[Filter]) -> str | None:
        """The name of the first filter that leaves the document out."""
        if not len(content):
            return EMPTY
        if not isinstance(content, str) and (self.sketcher or any(item.text_score for item in filters)):
            names = ", ".join(item.kind for item in self.setup.filters if item.kind == DUPLICATES or item.text_score)
            raise UserError(f"{record.where} holds token ids, {names} want text: filter by tokens or field.NAME alone")
        for item in filters:
            score = item.text_score(content) if item.text_score else score_of(record, item.field or "")
            if not item.keeps(score):
                return item.kind
        return None

    def _write(self, batch: list[_Document], domain: int, writer: FrameWriter, counts: dict[str, Any]) -> None:
        limits = [item for item in self.setup.own_filters(domain) if item.kind == TOKENS]
        kept = []
        for document, ids in zip(batch, self._framed(batch), strict=True):
            if all(item.keeps(len(ids)) for item in limits):
                kept.append((document, ids))
            else:
                counts["filtered"][TOKENS] += 1
        if not kept:
            return
        arrays = {
            "hash": np.array([document_hash(ids, self.setup.seed) for _, ids in kept], np.uint64),
            "tokens": np.array([len(ids) for _, ids in kept], np.uint32),
            "ids": np.concatenate([ids for _, ids in kept]).astype(self.dtype),
        }
        if self.sketcher:
            arrays["sketch"] = np.stack([self.sketcher.sketch(document.content) for document, _ in kept])
        writer.add({}, arrays)

    def _framed(self, batch: list[_Document]) -> Iterator[np.ndarray]:
        """The ids of each document between BOS and EOS; given ids may have them already."""
        fragments = [
            fragment for item in batch if isinstance(item.content, str) for fragment in cut(item.content, self.cutting)
        ]
        found = zip(fragments, fragment_ids(self.setup.tokenizer, fragments), strict=True)
        bos, eos = self.setup.special.bos, self.setup.special.eos
        for item in batch:
            if isinstance(item.content, str):
                parts = []
                for fragment, ids in found:
                    parts.append(ids)
                    if fragment.last:
                        break
                whole = np.concatenate([[bos], *parts, [eos]]).astype(np.int64, copy=False)
                check_ids([int(whole.min()), int(whole.max())], self.setup.vocab_size, "the data")
            else:
                whole = item.content
                check_ids([int(whole.min()), int(whole.max())], self.setup.vocab_size, item.record.where)
                before, after = [bos] * int(whole[0] != bos), [eos] * int(whole[-1] != eos)
                whole = np.concatenate([before, whole, after]).astype(np.int64)
            yield whole
