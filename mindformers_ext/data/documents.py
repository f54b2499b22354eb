# SPDX-License-Identifier: Apache-2.0
"""Documents with labels to rows: several to a row, or one, always whole (``core.documents``)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.documents import DOCUMENT_IDS, MOST_DOCUMENTS

Ids = npt.NDArray[np.int32]
IGNORED = -100
PACK, PAD = STRATEGIES = ("pack", "pad")  # MindFormers' word for the first; one document to a row


class Document(NamedTuple):
    """Token ids and labels of one length; the first label bears no loss, since nothing of the document is before it."""

    ids: Ids
    labels: Ids


class DocumentPacker:
    """Next-fit: documents keep their order, and a row closes when the next one does not fit, or at 128 of them.

    Args:
        length: tokens of a row.
        pad_id: fills rows.
        strategy: of ``STRATEGIES``; "pad" closes a row behind every document.
    """

    def __init__(self, length: int, pad_id: int, strategy: str = PACK) -> None:
        self.length, self.pad_id = length, pad_id
        self.most = MOST_DOCUMENTS if strategy == PACK else 1
        self._held: list[Document] = []

    def add(self, document: Document) -> dict[str, Ids] | None:
        """The row that closes, if one does. A document is not longer than a row."""
        size = sum(len(held.ids) for held in self._held)
        closed = None
        if len(self._held) == self.most or size + len(document.ids) > self.length:
            closed = self.close()
        self._held.append(document)
        return closed

    def close(self) -> dict[str, Ids] | None:
        """The row that is open, if there is one."""
        if not self._held:
            return None
        lengths = [len(document.ids) for document in self._held]
        row = {
            "input_ids": filled([document.ids for document in self._held], self.length, self.pad_id),
            "labels": filled([document.labels for document in self._held], self.length, IGNORED),
            DOCUMENT_IDS: documents_of(lengths, self.length),
        }
        self._held = []
        return row


def filled(parts: list[Ids], length: int, value: int) -> Ids:
    """The parts one after the other, and ``value`` behind them."""
    missing = length - sum(map(len, parts))
    whole: Ids = np.concatenate([*parts, np.full(missing, value, np.int32)]).astype(np.int32, copy=False)
    return whole


def wrong_documents(ids: Ids) -> int | None:
    """The first of rows (rows, length) that are not numbered so, None where all are."""
    step = np.diff(ids, axis=1)
    rises = (step == 0) | (step == 1) & (ids[:, :-1] > 0) | (ids[:, 1:] == 0)
    fine = rises.all(axis=1) & ((ids[:, 0] == 1) | (ids == 0).all(axis=1)) & (ids.max(axis=1) <= MOST_DOCUMENTS)
    wrong = np.flatnonzero(~fine)
    return int(wrong[0]) if len(wrong) else None


def documents_of(lengths: list[int], width: int) -> Ids:
    """The column (width) int32 of a row that holds documents of these lengths."""
    result = np.zeros(width, np.int32)
    numbers = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    result[: len(numbers)] = numbers
    return result
