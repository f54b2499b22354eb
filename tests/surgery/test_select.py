# SPDX-License-Identifier: Apache-2.0
"""Thresholds found by counting are those of sorting, for every type, with ties, in any chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.surgery.merge.random_masks import keep_mask, uniform, words
from mindformers_ext.surgery.merge.select import FirstEqual, largest_of_each

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(TYPES), seed=st.integers(0, 999), coarse=st.booleans())
def test_the_k_largest(data, dtype, seed, coarse):
    count = data.draw(st.integers(1, 300))
    k = data.draw(st.integers(1, count))
    size = data.draw(st.integers(1, count))
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(count)).to(dtype)
    values = (values * 3).round() if coarse else values  # many equal magnitudes, zeros of both signs
    threshold = largest_of_each(lambda: ((part,) for part in values.split(size)), (k,), dtype)[0]
    picker = FirstEqual(threshold)
    mask = torch.cat([picker.mask(part) for part in values.split(size)]).bool()
    want = torch.zeros(count, dtype=torch.bool)
    want[values.abs().argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(mask, want)


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_random_words_are_the_same_in_any_pieces(kind):
    whole = words(1, "a", 0, 0, 1000, kind)
    for step in (1, 7, 64, 999):
        assert np.array_equal(
            whole, np.concatenate([words(1, "a", 0, s, min(step, 1000 - s), kind) for s in range(0, 1000, step)])
        )
    assert not np.array_equal(whole, words(1, "a", 1, 0, 1000))
    assert not np.array_equal(whole, words(1, "b", 0, 0, 1000))


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.1, 0.53, 1 - 1e-7, 1.0])
def test_masks_and_numbers_have_their_share(density):
    mask = keep_mask(0, "a", 0, 0, (400, 500), density)
    assert mask.mean() == pytest.approx(density, abs=4 * 0.5 / np.sqrt(200_000))
    drawn = uniform(0, "a", 0, 0, (400, 500))
    assert 0 <= drawn.min() and drawn.max() < 1
    assert (drawn < density).float().mean().item() == pytest.approx(density, abs=4 * 0.5 / np.sqrt(200_000))
