# SPDX-License-Identifier: Apache-2.0
"""Rows packed of several documents: what their column ``document_ids`` may hold.

A row numbers its documents 1, 2, ... in order; 0 is the padding behind the last one. A token attends to its own
document alone, and positions begin anew in each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DOCUMENT_IDS = "document_ids"
MOST_DOCUMENTS = 128  # of a row: a kernel of variable length gets as many lengths for every row, whatever it holds


Ids = npt.NDArray[np.int32]


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
