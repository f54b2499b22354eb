# SPDX-License-Identifier: Apache-2.0
"""Encoded documents with labels to rows: packed, one to a row, or in pairs; what does not fit is counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mindformers_ext.core.preferences import PAIR_COLUMNS
from mindformers_ext.data.documents import IGNORED, PAD, Document, DocumentPacker, filled
from mindformers_ext.jobs.preprocess.encode import Tokens
from mindformers_ext.jobs.preprocess.request import Checked

Row = dict[str, np.ndarray]


class DocumentRows:
    """``counts`` gets what is left out: "too_long", its tokens as "too_long_tokens", "masked", "masked_skipped"."""

    def __init__(self, checked: Checked, counts: dict[str, int]) -> None:
        request, self.length, self.pad_id = checked.request, checked.row_length, checked.special.pad
        self.counts, self.skips, self.pairs = counts, bool(request.skip_masked), request.is_pairs
        self.packer = DocumentPacker(self.length, self.pad_id, request.pack_strategy or PAD)

    def add(self, tokens: Tokens) -> Iterator[Row]:
        """The rows that these documents close."""
        documents = tokens.each()
        if self.pairs:
            for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
                yield from self._pair(chosen, rejected)
            return
        for document in documents:
            if self._fits(document):
                closed = self.packer.add(document)
                if closed is not None:
                    yield closed

    def close(self) -> Iterator[Row]:
        """The row that is open."""
        row = self.packer.close()
        if row is not None:
            yield row

    def _fits(self, document: Document) -> bool:
        if len(document.ids) > self.length:
            self.counts["too_long"] += 1
            self.counts["too_long_tokens"] += len(document.ids)
            return False
        if (document.labels != IGNORED).any():
            return True
        self.counts["masked_skipped" if self.skips else "masked"] += 1
        return not self.skips

    def _pair(self, chosen: Document, rejected: Document) -> Iterator[Row]:
        """A pair of which an answer is empty, or was cut off whole, teaches nothing."""
        if any((document.labels == IGNORED).all() for document in (chosen, rejected)):
            self.counts["masked_skipped"] += 1
            return
        values = [part for document in (chosen, rejected) for part in document]
        fills = (self.pad_id, IGNORED) * 2
        yield {
            name: filled([part], self.length, value)
            for name, part, value in zip(PAIR_COLUMNS, values, fills, strict=True)
        }
