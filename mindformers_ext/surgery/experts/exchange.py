# SPDX-License-Identifier: Apache-2.0
"""Two rows change places between two clusters where that raises the objective.

With S the sums of clusters, moving i from a to b and j from b to a gives |S_a|^2 + 2 S_a.(x_j - x_i) + |x_i - x_j|^2,
and the same with a and b, i and j exchanged: exact gains from products of rows with sums and with each other. Only rows
near a border are looked at, so that their products with each other are few.
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.surgery.experts.objective import Objective

CANDIDATES = 512
SWEEPS = 2
LEAST = 1e-9  # gain relative to the objective, below which rounding decides


def exchange(x: np.ndarray, labels: np.ndarray, sums: np.ndarray, objective: Objective) -> np.ndarray:
    """``labels`` (n,) after exchanges; ``x`` (n, width), ``sums`` (E, width). The objective never falls."""
    scores = objective.centres(sums).astype(np.float32) @ x.T
    own = scores[labels, np.arange(len(x))]
    scores[labels, np.arange(len(x))] = -np.inf
    margin = scores.max(0) - own
    chosen = np.argsort(-margin, kind="stable")[:CANDIDATES]
    near = x[chosen]
    gram = near @ near.T
    pairs = _Pairs(labels[chosen], near @ sums.T.astype(np.float32), np.einsum("ij,ij->i", sums, sums), gram)
    least = LEAST * abs(objective.value(sums))
    for _ in range(SWEEPS):
        hopeful = pairs.hopeful(objective, least)
        if not sum(pairs.improve(row, objective, least) for row in hopeful):
            break
    result = labels.copy()
    result[chosen] = pairs.labels
    return result


class _Pairs:
    """The candidates' clusters, and everything that gains are made of, in float32: a gain is far above its rounding."""

    def __init__(self, labels: np.ndarray, products: np.ndarray, squares: np.ndarray, gram: np.ndarray) -> None:
        """products: (rows, E) of rows with sums. squares: |S_e|^2. gram: (rows, rows)."""
        self.labels, self.squares, self.products = labels.astype(np.int16), squares.copy(), products
        norms = np.diag(gram)
        self.gram, self.apart = gram, norms + norms[:, None] - 2 * gram
        self.own = self.products[np.arange(len(labels)), labels]

    def hopeful(self, objective: Objective, least: float) -> np.ndarray:
        """Rows that could gain, those that gain most first; the objective bends downwards, so its slope is a bound."""
        slope = objective.slope(self.squares).astype(np.float32)[self.labels]
        gain = self.products[:, self.labels]
        gain -= self.own
        gain *= 2
        gain += self.apart
        gain *= slope  # of the partner's cluster, by the row that comes
        gain = gain + gain.T
        gain[self.labels == self.labels[:, None]] = 0
        best = gain.max(1)
        order = np.argsort(-best, kind="stable")
        return order[: int((best > least).sum())]

    def improve(self, row: int, objective: Objective, least: float) -> bool:
        """Exchange ``row`` with the partner that gains most, if that is at least ``least``."""
        here, there = self.labels[row], self.labels
        left = self.squares[here] + 2 * (self.products[:, here] - self.own[row]) + self.apart[row]
        come = self.squares[there] + 2 * (self.products[row, there] - self.own) + self.apart[row]
        before = objective.of_squares(self.squares)
        gain = objective.of_squares(left) + objective.of_squares(come) - before[here] - before[there]
        gain[there == here] = 0
        other = int(gain.argmax())
        if gain[other] <= least:
            return False
        self._swap(row, other, left[other], come[other])
        return True

    def _swap(self, row: int, other: int, square: float, other_square: float) -> None:
        here, there = self.labels[row], self.labels[other]
        change = self.gram[other] - self.gram[row]
        self.products[:, here] += change
        self.products[:, there] -= change
        self.squares[here], self.squares[there] = square, other_square
        self.labels[row], self.labels[other] = there, here
        self.own = self.products[np.arange(len(self.labels)), self.labels]
