# SPDX-License-Identifier: Apache-2.0
"""Caps, floors and least entropy of proportions, met by a projection.

Of p, which sums to 1, the projection is p'_i = clip(c p_i^t, min_weight, max_weight): c makes the sum 1, and t is the
largest number from 0 to 1 with which the entropy is at least ``min_entropy``. With t = 1 this is the nearest point
within the caps by Kullback-Leibler divergence, which keeps the ratios of all domains that touch no cap; a smaller t
draws all towards 1/n. Where p itself fits, nothing changes. Entropy falls as t grows (the order of the domains stays,
and a larger t moves weight from the lighter to the heavier ones), so t is found by halving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
HALVINGS = 60  # of an interval of exponents: a double's digits


@dataclass(frozen=True)
class Bounds:
    """Every proportion is from ``low`` to ``high``, and their entropy, in nats, at least ``entropy``."""

    low: float = 0.0
    high: float = 1.0
    entropy: float = 0.0

    def allow(self, count: int) -> bool:
        """Whether proportions of ``count`` domains can fit: 1/n does, or none."""
        return self.low * count <= 1.0 <= self.high * count and self.entropy <= np.log(count)

    def hold(self, proportions: Floats) -> bool:
        """Whether ``proportions`` (n) fit as they are."""
        inside = bool((proportions >= self.low).all() and (proportions <= self.high).all())
        return inside and entropy(proportions) >= self.entropy

    def nearest(self, proportions: Floats) -> Floats:
        """The projection of ``proportions`` (n), which sum to 1; see the module. They must be ``allow``ed."""
        if self.hold(proportions):
            return proportions
        capped = self._capped(proportions)
        if entropy(capped) >= self.entropy:
            return capped
        with np.errstate(divide="ignore"):
            logs = np.log(proportions)
        below, above = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (below + above)
            if entropy(self._flattened(logs, middle)) >= self.entropy:
                below = middle
            else:
                above = middle
        return self._flattened(logs, below)

    def _flattened(self, logs: Floats, exponent: float) -> Floats:
        if exponent == 0.0:
            return np.full(len(logs), 1.0 / len(logs))
        weights = np.exp(exponent * (logs - logs.max()))
        return self._capped(weights / weights.sum())

    def _capped(self, weights: Floats) -> Floats:
        """clip(c weights, low, high) with the c that makes the sum 1, to the last digits exactly within the caps."""
        if (weights >= self.low).all() and (weights <= self.high).all():
            return weights
        if not (weights > 0).all():  # a proportion of 0 has no ratio to keep: what is left over is shared evenly
            weights = np.maximum(weights, np.finfo(np.float64).tiny)
        # in the order of weights, some first domains sit at the floor and some last ones at the cap
        marks = np.sort(np.concatenate([self.low / weights, self.high / weights]))
        sums = np.array([np.clip(mark * weights, self.low, self.high).sum() for mark in marks])
        place = int(np.searchsorted(sums, 1.0))
        place = min(max(place, 1), len(marks) - 1)
        middle = 0.5 * (marks[place - 1] + marks[place])
        scaled = middle * weights
        free = (scaled > self.low) & (scaled < self.high)
        result = np.clip(scaled, self.low, self.high)
        if free.any():
            left = 1.0 - result[~free].sum()
            result[free] = np.clip(weights[free] * (left / weights[free].sum()), self.low, self.high)
        return np.asarray(result)


def entropy(proportions: Floats) -> float:
    """-sum p ln p in nats; 0 counts as 0."""
    held = proportions[proportions > 0]
    return float(-(held * np.log(held)).sum())
