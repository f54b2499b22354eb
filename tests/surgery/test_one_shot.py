# SPDX-License-Identifier: Apache-2.0
"""Masks from scores, output matrices by least squares, and masks that begin in the order of scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.surgery.prune.cut import full_masks, pruned_shape
from mindformers_ext.surgery.prune.hard_concrete import sparsity
from mindformers_ext.surgery.prune.importance import best, by_chance, masks_of_scores
from mindformers_ext.surgery.prune.least_squares import add_moments, fitted, relative_error
from mindformers_ext.surgery.prune.warm_start import ordered_loga
from tests.helpers.prune_cases import GQA, MHA


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (6, 2), (4, 2), (3, 1), (1, 1)])
def test_grouped_heads_stay_regular_for_any_scores(heads: int, groups: int) -> None:
    target = replace(GQA, num_attention_heads=heads, num_key_value_heads=groups, hidden_size=7, num_hidden_layers=2)
    for seed in range(5):
        scores = by_chance(GQA, seed)
        values = masks_of_scores(scores, GQA, target)
        full = full_masks(values, GQA, tied=False)
        assert pruned_shape(full) == target
        for layer, masks in enumerate(full.layers):
            by_group = masks.heads.reshape(GQA.num_key_value_heads, -1)
            assert set(by_group.sum(1)) <= {0.0, heads / groups}
            np.testing.assert_array_equal(by_group.any(1), masks.kv_heads)
            kept, gone = (scores.groups[layer][masks.kv_heads == value] for value in (1.0, 0.0))
            assert not gone.size or kept.min() > gone.max()


def test_equal_scores_keep_the_lower_numbers_and_nothing_changes_nothing() -> None:
    np.testing.assert_array_equal(best(np.array([[1.0, 1.0, 0.0, 1.0]]), 2), [[1, 1, 0, 0]])
    assert masks_of_scores(by_chance(MHA, 0), MHA, MHA) == {}


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_never_raises_the_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, out, tokens = (int(rng.integers(2, 20)) for _ in range(3))
    inputs = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) * 10.0 ** rng.integers(-4, 4)
    inputs[:, rng.random(width) < 0.2] = 0.0
    weight, outputs = rng.normal(size=(out, width)), rng.normal(size=(tokens, out))
    kept = np.flatnonzero(rng.random(width) < 0.6)
    moments = np.zeros((width, width))
    add_moments(moments, inputs, outputs)
    chosen = fitted(moments, weight, kept)
    before = relative_error(moments, weight, kept, weight[:, kept])
    after = relative_error(moments, weight, kept, chosen)
    assert after <= before * (1 + 1e-12) + 1e-15
    weighed = inputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    whole, left = weighed @ weight.T, weighed @ weight.T - weighed[:, kept] @ chosen.T
    assert after == pytest.approx((left**2).sum() / max((whole**2).sum(), 1e-300), abs=1e-9)


def test_least_squares_finds_a_neuron_that_repeats_others() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 6))
    inputs[:, 5] = 2 * inputs[:, 0] - inputs[:, 3]
    weight, moments, kept = rng.normal(size=(4, 6)), np.zeros((6, 6)), np.arange(5)
    add_moments(moments, inputs, np.ones((50, 4)))
    chosen = fitted(moments, weight, kept, ridge=1e-12)
    np.testing.assert_allclose(chosen[:, 0], weight[:, 0] + 2 * weight[:, 5], atol=1e-8)
    np.testing.assert_allclose(chosen[:, 3], weight[:, 3] - weight[:, 5], atol=1e-8)


@pytest.mark.parametrize("start", [0.003, 0.1, 0.45])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_masks_begin_in_order_at_the_sparsity_asked_for(start: float, count: int) -> None:
    scores = np.random.default_rng(0).random((3, count))
    loga = ordered_loga(scores, start)
    np.testing.assert_allclose(sparsity(loga), start, atol=1e-6)
    ranked = np.take_along_axis(loga, np.argsort(-scores, 1), 1)
    assert (np.diff(ranked, axis=1) <= 0).all() and loga.max() <= 4.6052 and loga.min() >= -4.6052
