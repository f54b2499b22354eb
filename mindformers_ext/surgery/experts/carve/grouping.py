# SPDX-License-Identifier: Apache-2.0
"""Neurons grouped so that a linear router's own choice of groups keeps as much as it can.

Alternates: a damped least-squares router predicts sqrt(E_tj), what group j adds to token t; of its A best groups each
neuron's gain is what it adds to the tokens that would choose it; an exact assignment of equal groups takes the highest
sum of gains. The choice a router predicts, not the best one, so that nothing is built on what it cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindformers_ext.surgery.experts.assign import assign
from mindformers_ext.surgery.experts.carve.choose import linear_choice
from mindformers_ext.surgery.experts.carve.sample import LayerSample
from mindformers_ext.surgery.ridge import Floats, add_products, factor, solve

DAMPING = 0.1  # of the mean square of what enters
ROUNDS = 12
STILL = 0.01  # of the labels: when fewer change, it is over


@dataclass(frozen=True, eq=False)
class InputFit:
    """Damped least squares on what enters a layer: the factor of X'X, made once. No intercept, which files lack."""

    x: np.ndarray
    lower: Floats

    @classmethod
    def of(cls, x: np.ndarray, damping: float = DAMPING) -> InputFit:
        """On x (T, D)."""
        squares = np.zeros((x.shape[1], x.shape[1]))
        for start in range(0, len(x), 4096):
            part = x[start : start + 4096]
            add_products(squares, part, part)
        return cls(x, factor(squares, damping)[0])

    def rows(self, targets: np.ndarray) -> np.ndarray:
        """float64 (E, D): the linear router that predicts ``targets`` (T, E)."""
        products = np.zeros((self.x.shape[1], targets.shape[1]))
        add_products(products, self.x, targets)
        return np.ascontiguousarray(solve(self.lower, products).T)


def by_prediction(sample: LayerSample, fit: InputFit, rest: np.ndarray, labels: np.ndarray, chosen: int) -> np.ndarray:
    """int64 (len(rest)): groups of the neurons ``rest``, beginning with ``labels``; ``chosen`` is A."""
    experts = int(labels.max()) + 1
    sizes = np.full(experts, len(rest) // experts)
    prices = None
    for _ in range(ROUNDS):
        every = np.full(sample.hidden.shape[1], -1)
        every[rest] = labels
        rows = fit.rows(np.sqrt(sample.group_energies(every, experts)))
        picked = linear_choice(sample.x, rows, chosen)
        gains = sample.sums_where(picked.astype(np.float32))[:, rest]
        found, prices = assign(gains / max(gains.max(initial=0.0), 1e-300), sizes, prices)
        changed = np.count_nonzero(found != labels)
        labels = found
        if changed < STILL * len(rest):
            break
    return labels
