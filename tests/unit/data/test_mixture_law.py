# SPDX-License-Identifier: Apache-2.0
"""The law of losses by proportions: found again where runs obey it, and its least found within limits."""

from __future__ import annotations

import numpy as np
import pytest

from mindformers_ext.data.mixture.law import Law, best_proportions, best_with_spread, fitted


def made_up(seed: int, count: int) -> Law:
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(-0.5, 0.5, (count, count))
    slopes[np.arange(count), np.arange(count)] -= 1.5  # a domain gains most from itself
    return Law(rng.uniform(1, 2, count), slopes)


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_that_obey_a_law_give_it_back(seed: int) -> None:
    law, shares = made_up(seed, 3), np.random.default_rng(seed).dirichlet(np.ones(3), 8)
    found = fitted(shares, law.losses(shares))
    np.testing.assert_allclose(found.constants, law.constants, atol=1e-6)
    np.testing.assert_allclose(found.slopes, law.slopes, atol=1e-6)


@pytest.mark.parametrize("caps", [(1.0, 1.0, 1.0), (0.3, 1.0, 1.0), (0.2, 0.3, 0.6)])
def test_the_best_proportions_satisfy_the_conditions_of_a_least_sum(caps: tuple[float, ...]) -> None:
    law, weights = made_up(2, 3), np.array([0.5, 0.25, 0.25])
    best = best_proportions(law, weights, np.array(caps))
    assert best.sum() == pytest.approx(1) and (best >= 0).all() and (best <= np.array(caps) + 1e-9).all()
    slope = (weights * (law.losses(best) - law.constants)) @ law.slopes  # Karush, Kuhn and Tucker's, of a convex sum
    free = (best > 1e-6) & (best < np.array(caps) - 1e-6)
    level = slope[free].mean() if free.any() else slope[best > 1e-6].max()
    np.testing.assert_allclose(slope[free], level, atol=1e-4)
    assert (slope[best <= 1e-6] >= level - 1e-4).all(), "a domain left out would not lower the sum"
    assert (slope[best >= np.array(caps) - 1e-6] <= level + 1e-4).all(), "a domain at its cap would take more"


def test_error_bars_cover_the_truth_and_vanish_without_noise() -> None:
    law, rng = made_up(0, 2), np.random.default_rng(0)
    shares, weights, caps = rng.dirichlet(np.ones(2), 10), np.full(2, 0.5), np.ones(2)
    truth = best_proportions(law, weights, caps)
    clean = best_with_spread(shares, law.losses(shares), weights, caps, 10, 0)
    assert clean.spread.max() < 1e-4 and clean.fits > 5
    noisy = best_with_spread(shares, law.losses(shares) + 0.01 * rng.standard_normal((10, 2)), weights, caps, 20, 0)
    assert (np.abs(noisy.proportions - truth) < 4 * noisy.spread + 1e-3).all() and noisy.spread.min() > 1e-3
