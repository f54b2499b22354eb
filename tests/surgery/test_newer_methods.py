# SPDX-License-Identifier: Apache-2.0
"""karcher, multislerp, nearswap, arcee_fusion, ram and ramplus_tl against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from tests.helpers import merge_oracle as oracle
from tests.surgery.test_methods import SHAPES, arrays, merged, wide

ROWS = st.sampled_from([None, 1, 3])
CLOSE = {"rtol": 0, "atol": 3e-6}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), shape=SHAPES, rows=ROWS, t=st.floats(0, 0.3), spread=st.sampled_from([0.1, 1.0]))
def test_nearswap(seed, shape, rows, t, spread):
    base, one = arrays(seed, shape, 1, spread)
    got = merged("nearswap", base, [one], {"t": t}, rows=rows)
    np.testing.assert_allclose(got, oracle.nearswap(*wide([base, one]), t), **CLOSE)
    near = np.abs(base - one) <= t * (1 - 1e-6)
    assert np.array_equal(got[near], one[near].astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), shape=SHAPES, rows=ROWS, count=st.integers(1, 4), r=st.floats(0, 1))
def test_ram_and_ramplus(seed, shape, rows, count, r):
    base, *inputs = arrays(seed, shape, count)
    random = np.random.default_rng(seed)
    inputs = [np.where(random.random(shape) < 0.5, x, base) for x in inputs]  # what a model left as it was
    b, *xs = wide([base, *inputs])
    got = merged("ram", base, inputs, {"epsilon": 1e-4}, rows=rows)
    np.testing.assert_allclose(got, oracle.ram(b, xs, 1e-4), **CLOSE)
    factors = oracle.ramplus_factors(b, xs, 1e-4, r, 0.5)
    got = merged("ramplus_tl", base, inputs, {"epsilon": 1e-4, "r": r, "alpha": 0.5}, rows=rows)
    np.testing.assert_allclose(got, oracle.ram(b, xs, 1e-4, factors), **CLOSE)


@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("shape", [(40,), (12, 9), (3, 4, 8), (1, 1)])
def test_arcee_fusion(shape, rows):
    base, one = arrays(4, shape, 1, 0.5)
    got = merged("arcee_fusion", base, [one], rows=rows)
    want = oracle.arcee_fusion(*wide([base, one]))
    np.testing.assert_allclose(got, want, **CLOSE)
    if base.size > 30:
        assert 0 < np.mean(got == base) < 1  # some elements came from each
    half = merged("arcee_fusion", base, [base], rows=rows, dtype=torch.bfloat16)
    assert np.array_equal(half, torch.from_numpy(base).to(torch.bfloat16).double().numpy())


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_multislerp_and_karcher(rows, spread):
    base, *inputs = arrays(3, (12, 9), 3, spread)
    b, *xs = wide([base, *inputs])
    weights = [0.2, 0.5, 0.9]
    each = [{"weight": weight} for weight in weights]
    close = {"rtol": 0, "atol": 3e-6 * max(1, spread)}
    np.testing.assert_allclose(
        merged("multislerp", None, inputs, None, each, rows), oracle.multislerp(xs, weights), **close
    )
    want = oracle.multislerp(xs, weights, b)
    np.testing.assert_allclose(merged("multislerp", base, inputs, None, each, rows), want, **close)
    np.testing.assert_allclose(merged("karcher", None, inputs, rows=rows), oracle.karcher(xs), **close)
    want = oracle.karcher(xs, steps=1)
    np.testing.assert_allclose(merged("karcher", None, inputs, {"max_iter": 1}, rows=rows), want, **close)


def test_means_on_a_sphere_keep_what_they_must():
    base, one, two = arrays(7, (6, 5), 2, 1.0)
    same = [{"weight": 1.0}] * 2
    for method, start in (("karcher", None), ("multislerp", None), ("multislerp", base)):
        each = same if method == "multislerp" else None
        np.testing.assert_allclose(merged(method, start, [one, one], None, each), one, atol=2e-6)
        there, back = (merged(method, start, pair, None, each) for pair in ([one, two], [two, one]))
        np.testing.assert_allclose(there, back, atol=2e-6)
        single = merged(method, start, [one], None, same[:1] if each else None)
        assert np.array_equal(single, one.astype(np.float64))
    scaled = (two * np.linalg.norm(one) / np.linalg.norm(two)).astype(np.float32)
    assert np.linalg.norm(merged("karcher", None, [one, scaled])) == pytest.approx(np.linalg.norm(one), rel=1e-5)
    half_way = oracle.slerp(*wide([one, scaled]), 0.5)
    np.testing.assert_allclose(merged("karcher", None, [one, scaled]), half_way, atol=3e-6)
    zero = np.zeros_like(one)
    np.testing.assert_allclose(merged("karcher", None, [one, zero]), one / 2, atol=2e-6)
    assert np.array_equal(merged("karcher", None, [zero, zero]), zero)
    assert np.isfinite(merged("karcher", None, [one, -one])).all()
    assert np.isfinite(merged("karcher", None, [one, one], {"tol": 0.0})).all()


def test_multislerp_of_directions_that_cancel_out():
    """Two opposite ones have a line between them; models that changed nothing give the base; three have no mean."""
    base, one = arrays(7, (6, 5), 1, 1.0)
    each = [{"weight": 1.0}] * 3
    np.testing.assert_allclose(merged("multislerp", None, [one, -3 * one], None, each[:2]), -one, atol=1e-6)
    assert np.array_equal(merged("multislerp", base, [base] * 3, None, each), base.astype(np.float64))
    opposite = [np.array([1.0, 0]), np.array([-1.0, 0]), np.array([0.0, 0])]
    with pytest.raises(UserError, match="cancel out in 'w'"):
        merged("multislerp", None, opposite, None, each)
