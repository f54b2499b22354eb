# SPDX-License-Identifier: Apache-2.0
"""Packing loses no token without counting it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.packing import PackingCounts, check_ids, pack

documents = st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=12)


@given(documents, st.integers(1, 9))
def test_rows_are_the_stream_cut_in_order(docs: list[list[int]], length: int) -> None:
    counts = PackingCounts()
    rows = list(pack(docs, length, counts))
    stream = [token for ids in docs for token in ids]
    whole = len(stream) // length * length
    assert [int(token) for row in rows for token in row] == stream[:whole]
    assert all(row.shape == (length,) and row.dtype == np.int32 for row in rows)
    assert counts == PackingCounts(len(docs), len(stream), len(rows), len(stream) - whole)


def test_rows_come_before_the_documents_end() -> None:
    def endless():
        while True:
            yield [7, 8, 9]

    rows = pack(endless(), 4, PackingCounts())
    assert [next(rows).tolist() for _ in range(3)] == [[7, 8, 9, 7], [8, 9, 7, 8], [9, 7, 8, 9]]


def test_a_row_is_a_copy_that_later_rows_do_not_change() -> None:
    rows = list(pack([[1, 2, 3, 4]], 2, PackingCounts()))
    rows[1][:] = 0
    assert rows[0].tolist() == [1, 2]


def test_length_must_be_positive() -> None:
    with pytest.raises(UserError, match="row length 0"):
        next(pack([[1]], 0, PackingCounts()))


@pytest.mark.parametrize("ids", [[0, 5, 10], [-1, 3]])
def test_ids_outside_the_vocabulary_are_named(ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"train.txt holds token id {ids[-1] if ids[0] == 0 else -1}"):
        check_ids(ids, 10, "train.txt")


def test_ids_inside_the_vocabulary_pass() -> None:
    check_ids([0, 9], 10, "train.txt")
    check_ids([], 10, "train.txt")
