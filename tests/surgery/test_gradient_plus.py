# SPDX-License-Identifier: Apache-2.0
"""Gradient Split Plus: golden cases taken from the published program, and what must hold for any scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts.gradient_plus import plus_split

FIRST = ([9, 8, 7, 1, 2, 3], [9, 1, 7, 8, 2, 3])
CUT = ([1, 2, 9, 3, 7, 8], [8, 7, 9, 3, 2, 1])
GOLDEN = [
    (FIRST, 2, 1, False, "max", [0, 2], [[1, 4], [3, 5]]),
    (FIRST, 2, 1, True, "max", [0, 2], [[1, 5], [3, 5]]),
    (FIRST, 2, 1, False, "min", [4, 5], [[3, 0], [1, 2]]),
    (FIRST, 2, 1, True, "min", [4, 5], [[3, 2], [1, 2]]),
    (FIRST, 3, 0, False, "max", [], [[1, 4, 5], [0, 2, 3]]),
    (FIRST, 3, 0, True, "max", [], [[0, 1, 2], [0, 3, 2]]),
    (([5, 1, 9, 8], [1, 5, 9, 8]), 1, 1, True, "max", [2], [[3], [3]]),
    (CUT, 2, 1, False, "max", [2, 0], [[5, 4], [1, 3]]),
    (CUT, 2, 1, True, "max", [2, 0], [[5, 4], [1, 3]]),
    (([1, 2, 9, 3, 7, 8, 4, 5], [8, 7, 9, 3, 2, 1, 6, 0]), 2, 2, False, "max", [2, 0, 1, 4], [[5, 7], [6, 3]]),
]


@pytest.mark.parametrize(("scores", "size", "residual", "share", "criterion", "always", "experts"), GOLDEN)
def test_golden_cases(scores, size, residual, share, criterion, always, experts) -> None:
    found = plus_split(np.array(scores, np.float32), size, residual, share, criterion)
    assert [neuron for part in found.residual for neuron in part] == always
    assert [part.tolist() for part in found.experts] == experts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_unshared_uses_every_neuron_once_and_shared_never_a_residual_one(data: st.DataObject) -> None:
    experts, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    residual, criterion = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(["max", "min"]))
    width = (experts + residual) * size
    values = data.draw(st.lists(st.integers(0, 6), min_size=experts * width, max_size=experts * width))
    scores = np.array(values, np.float32).reshape(experts, width)
    apart = plus_split(scores, size, residual, False, criterion)
    assert apart.is_partition and set(apart.sizes) == {size}
    own = scores if criterion == "max" else -scores
    if residual:  # best first
        assert all((np.diff(own[e][ids]) <= 0).all() for e, ids in enumerate(apart.experts))
        shared = plus_split(scores, size, residual, True, criterion)
        always = set(np.concatenate(shared.residual).tolist())
        assert always == set(np.concatenate(apart.residual).tolist())
        assert not any(always & set(ids.tolist()) for ids in shared.experts)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="the layer has 6"):
        plus_split(np.array(FIRST, np.float32), 2, 2)
    with pytest.raises(UserError, match="NaN"):
        plus_split(np.full((2, 4), np.nan), 2)
