# SPDX-License-Identifier: Apache-2.0
"""Expert capacity: the figures of MindFormers' capacity v2 and its bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.capacity import expert_capacity, round_up


@pytest.mark.parametrize(
    ("tokens", "factor", "multiple", "slots"),
    [(4096, 1.1, 1, 1127), (4096, 1.1, 4, 1128), (4096, 2.0, 1, 2048), (1024, 1.1, 1, 282), (10, 8.0, 4, 12)],
)
def test_mixtral_figures(tokens: int, factor: float, multiple: int, slots: int) -> None:
    assert expert_capacity(2, tokens, factor, 8, multiple) == slots


@given(st.integers(1, 8), st.integers(1, 10**6), st.floats(0.01, 16), st.integers(1, 64), st.integers(1, 8))
def test_bounds(chosen: int, tokens: int, factor: float, experts: int, multiple: int) -> None:
    slots = expert_capacity(chosen, tokens, factor, experts, multiple)
    wanted = min(math.ceil(chosen * tokens * factor / experts), tokens)
    assert slots % multiple == 0
    assert wanted <= slots < wanted + multiple
    assert slots >= 1


@given(st.integers(1, 8), st.integers(1, 10**4), st.integers(1, 16))
def test_a_factor_of_e_over_k_drops_nothing(chosen: int, tokens: int, experts: int) -> None:
    # enough for every token to choose the same expert
    assert expert_capacity(chosen, tokens, experts / chosen * (1 + 1e-12), experts) == tokens


@pytest.mark.parametrize("factor", [0, -1.0])
def test_dropless_has_no_fixed_capacity(factor: float) -> None:
    with pytest.raises(ValueError, match="dropless"):
        expert_capacity(2, 8, factor, 4)


@given(st.integers(0, 10**9), st.integers(1, 10**4))
def test_round_up(value: int, multiple: int) -> None:
    result = round_up(value, multiple)
    assert result % multiple == 0 and value <= result < value + multiple
