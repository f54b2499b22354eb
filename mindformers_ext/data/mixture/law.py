# SPDX-License-Identifier: Apache-2.0
"""How the losses of domains follow from the proportions, fitted to several runs, and what is best by it.

The law is log-linear: L_i(p) = c_i + exp(sum_j t_ij p_j), p on the simplex (data mixing laws, Ye et al. 2024,
arXiv:2403.16952, equation 6, with a constant factor inside t; Olmix, arXiv:2602.12237, finds it the best of the simple
ones). It is convex in p, so what is found is the least. Error bars come from fits to runs drawn with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STARTS = (0.0, 0.5, 0.9, 0.99)  # where c_i begins, as a share of the least loss seen
STEEP = 50.0  # |t_ij| at most: exp(50) is beyond any loss


@dataclass(frozen=True)
class Law:
    """constants c (n); slopes t (n, n): of the losses of domain i by the proportion of j. Losses in nats per token."""

    constants: Floats
    slopes: Floats

    def losses(self, proportions: Floats) -> Floats:
        """Of each domain (..., n) at ``proportions`` (..., n)."""
        return np.asarray(self.constants + np.exp(np.asarray(proportions, np.float64) @ self.slopes.T), np.float64)


@dataclass(frozen=True)
class Best:
    """Proportions (n) and the losses (n) that the law gives them; ``spread`` and ``loss_spread`` (n) are standard
    deviations over fits to ``fits`` drawings of the runs."""

    proportions: Floats
    losses: Floats
    spread: Floats
    loss_spread: Floats
    fits: int


def runs_needed(domains: int) -> int:
    """Runs at least: as many as the numbers that one domain's loss is described by."""
    return domains + 1


def fitted(proportions: Floats, losses: Floats) -> Law:
    """The law nearest to what K runs have shown, by least squares of the losses.

    Args:
        proportions: of the runs (K, n), K >= ``runs_needed(n)``.
        losses: of their domains (K, n), above 0.
    """
    shares = np.asarray(proportions, np.float64)
    pairs = [_fitted(shares, column) for column in np.asarray(losses, np.float64).T]
    return Law(np.array([constant for constant, _ in pairs]), np.stack([slopes for _, slopes in pairs]))


def _fitted(proportions: Floats, losses: Floats) -> tuple[float, Floats]:
    """c and t (n) of one domain's ``losses`` (K)."""
    from scipy.optimize import least_squares

    def missed(values: Floats) -> Floats:
        return np.asarray(values[0] + np.exp(proportions @ values[1:]) - losses, np.float64)

    def slope(values: Floats) -> Floats:
        grown = np.exp(proportions @ values[1:])[:, None] * proportions
        return np.concatenate([np.ones((len(losses), 1)), grown], 1)

    count, least = proportions.shape[1], float(losses.min())
    bounds = ([0.0, *[-STEEP] * count], [least, *[STEEP] * count])
    found = []
    for share in STARTS:
        constant = share * least
        slopes = np.linalg.lstsq(proportions, np.log(np.maximum(losses - constant, 1e-6 * least)), rcond=None)[0]
        start = np.array([constant, *np.clip(slopes, -STEEP, STEEP)])
        found.append(least_squares(missed, start, slope, bounds, method="trf", x_scale="jac", xtol=1e-12, ftol=1e-12))
    best = min(found, key=lambda one: float(one.cost))
    return float(best.x[0]), np.asarray(best.x[1:], np.float64)


def best_proportions(law: Law, weights: Floats, caps: Floats) -> Floats:
    """Proportions (n) with the least sum of ``weights`` (n) times losses, none above its ``caps`` (n)."""
    from scipy.optimize import minimize

    def value(shares: Floats) -> tuple[float, Floats]:
        grown = weights * np.exp(law.slopes @ shares)
        return float(weights @ law.constants + grown.sum()), grown @ law.slopes

    caps = np.minimum(caps, 1.0)
    found = minimize(
        value,
        caps / caps.sum(),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, float(cap)) for cap in caps],
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1.0, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    shares = np.clip(np.asarray(found.x, np.float64), 0.0, caps)
    return np.asarray(shares / shares.sum(), np.float64)


def best_with_spread(
    proportions: Floats, losses: Floats, weights: Floats, caps: Floats, drawings: int, seed: int
) -> Best:
    """``best_proportions`` of the law fitted to all runs, and how far it varies with the runs that happen to be there.

    Args:
        proportions, losses: of the runs, as ``fitted`` takes them.
        weights, caps: as ``best_proportions`` takes them.
        drawings: of the runs with replacement; one with too few different runs is not fitted.
        seed: of the drawings.
    """
    law = fitted(proportions, losses)
    best = best_proportions(law, weights, caps)
    rng, count = np.random.default_rng(seed), len(proportions)
    find = partial(best_proportions, weights=weights, caps=caps)
    laws = [
        fitted(proportions[drawn], losses[drawn])
        for drawn in (rng.integers(0, count, count) for _ in range(drawings))
        if len(np.unique(drawn)) >= runs_needed(proportions.shape[1])
    ]
    spread = loss_spread = np.full(len(best), np.nan)
    if len(laws) > 1:
        spread = np.std([find(one) for one in laws], axis=0, ddof=1)
        loss_spread = np.std([one.losses(best) for one in laws], axis=0, ddof=1)
    return Best(best, law.losses(best), spread, loss_spread, len(laws))
