# SPDX-License-Identifier: Apache-2.0
"""Packing: token lists of any length become rows of one length, cut from one continuous stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError


@dataclass
class PackingCounts:
    """What a packing run has taken and given so far: ``tokens == rows * length + dropped`` once it has ended."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    dropped: int = 0


def pack(documents: Iterable[Sequence[int]], length: int, counts: PackingCounts) -> Iterator[npt.NDArray[np.int32]]:
    """Join the documents end to end and cut rows of ``length`` tokens; the tail that fills no row is dropped.

    Nothing is dropped silently: ``counts`` is kept up to date while rows are taken, and when the iterator is exhausted
    its ``dropped`` holds the tail's size.

    Args:
        documents: token ids of one document each, BOS and EOS included where wanted.
        length: tokens of a row; a causal model of S positions trains on rows of S + 1.
        counts: is filled while the rows are taken.

    Yields:
        int32 rows of shape (length,).
    """
    if length < 1:
        raise UserError(f"row length {length} is not positive: give seq_length + 1 tokens")
    pending: list[int] = []
    for ids in documents:
        counts.documents += 1
        counts.tokens += len(ids)
        pending.extend(ids)
        whole = len(pending) // length
        for start in range(0, whole * length, length):
            counts.rows += 1
            yield np.asarray(pending[start : start + length], dtype=np.int32)
        del pending[: whole * length]
    counts.dropped = len(pending)


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Every id lies in [0, vocab_size), or a ``UserError`` names the worst one and ``what`` holds it."""
    if not len(ids):
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{what} holds token id {high if high >= vocab_size else low}, the vocabulary has ids 0 to "
            f"{vocab_size - 1}: raise vocab_size or use the tokenizer the model was made for"
        )
