# SPDX-License-Identifier: Apache-2.0
"""Packing: token lists of any length become rows of one length, cut from one continuous stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError

Ids = npt.NDArray[np.int32]


class Packer:
    """Takes token ids in parts of any size and gives the whole rows among them."""

    def __init__(self, length: int) -> None:
        """``length``: tokens of a row; a causal model of S positions trains on rows of S + 1."""
        if length < 1:
            raise UserError(f"row length {length} is not positive: give seq_length + 1 tokens")
        self.length = length
        self.rest: Ids = np.empty(0, np.int32)

    def add(self, ids: Ids) -> Ids:
        """The rows that ``ids`` complete, of shape (rows, length), as a copy; what fills no row waits in ``rest``."""
        stream = np.concatenate((self.rest, ids))
        whole = len(stream) // self.length * self.length
        self.rest = stream[whole:].copy()
        return stream[:whole].reshape(-1, self.length)


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
