# SPDX-License-Identifier: Apache-2.0
"""Packing loses no token without counting it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.packing import Packer, check_ids

documents = st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=12)


@given(documents, st.integers(1, 9))
def test_rows_are_the_stream_cut_in_order(docs: list[list[int]], length: int) -> None:
    packer = Packer(length)
    rows = [row for ids in docs for row in packer.add(np.array(ids, np.int32))]
    stream = [token for ids in docs for token in ids]
    assert all(row.shape == (length,) and row.dtype == np.int32 for row in rows)
    assert [int(token) for row in rows for token in row] + packer.rest.tolist() == stream
    assert len(packer.rest) < length


def test_a_row_is_a_copy_that_later_rows_do_not_change() -> None:
    packer, ids = Packer(2), np.arange(5, dtype=np.int32)
    rows = packer.add(ids)
    ids[:] = 0
    assert rows.tolist() == [[0, 1], [2, 3]] and packer.rest.tolist() == [4]


def test_length_must_be_positive() -> None:
    with pytest.raises(UserError, match="row length 0"):
        Packer(0)


@pytest.mark.parametrize("ids", [[0, 5, 10], [-1, 3]])
def test_ids_outside_the_vocabulary_are_named(ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"train.txt holds token id {ids[-1] if ids[0] == 0 else -1}"):
        check_ids(ids, 10, "train.txt")


def test_ids_inside_the_vocabulary_pass() -> None:
    check_ids([0, 9], 10, "train.txt")
    check_ids([], 10, "train.txt")
