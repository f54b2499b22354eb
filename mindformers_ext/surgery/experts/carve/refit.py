# SPDX-License-Identifier: Apache-2.0
"""A carved layer's output matrix fitted anew, so that what is computed makes up for what is not.

D becomes D + V': V is the smallest of sum_t w_t |D h_t - (D + V') m_t|^2 + r |V|^2, where m_t are the answers h_t with
0 for the experts that the token has not chosen; r is ``least_squares.RIDGE`` times the mean diagonal of
sum_t w_t m_t m_t'.
V = 0 is the plain carving, so the first term never rises. Of experts, only tokens that chose them are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise

import numpy as np

from mindformers_ext.surgery.experts.carve.sample import LayerSample
from mindformers_ext.surgery.prune.least_squares import RIDGE
from mindformers_ext.surgery.ridge import Floats, add_products, backward, factor, forward

PART = 4096  # tokens whose answers are multiplied at once


@dataclass(frozen=True, eq=False)
class RefitSums:
    """``squares`` (n, n), sum_t w_t m_t m_t', its lower triangle; ``products`` (n, D), sum_t w_t m_t (D h_t - D m_t)';
    both in the order of ``neurons``. ``lost``: sum_t w_t |D h_t - D m_t|^2."""

    neurons: np.ndarray
    squares: Floats
    products: Floats
    lost: float
    tokens: int

    def solve(self, down: np.ndarray, ridge: float = RIDGE) -> Refit:
        """The new matrix (D, F), float32. The squares are used up: their memory is the factor's."""
        lower, added = factor(self.squares, ridge)
        half = forward(lower, self.products.astype(np.float32))  # as exact as the matrix that is written
        gained = float(np.einsum("nd,nd->", half, half, dtype=np.float64))
        change = backward(lower, half)
        new = down.copy()
        new[:, self.neurons] += change.T
        left = self.lost - gained - added * float(np.einsum("nd,nd->", change, change, dtype=np.float64))
        return Refit(new, self.lost / self.tokens, max(left, 0.0) / self.tokens)


@dataclass(frozen=True, eq=False)
class Refit:
    """The new output matrix (D, F), and the mean weighted square error per token before and with it."""

    down: np.ndarray
    before: float
    after: float


def refit_sums(sample: LayerSample, always: np.ndarray, experts: Sequence[np.ndarray], chosen: np.ndarray) -> RefitSums:
    """The sums of a layer whose neurons ``always`` every token passes, and of ``experts`` those that are ``chosen``,
    bool (T, E). Experts that no token chooses keep their columns."""
    scale = np.sqrt(sample.weights).astype(np.float32)
    blocks = [(always, np.ones(len(chosen), bool))] if len(always) else []
    blocks += [(ids, chosen[:, place]) for place, ids in enumerate(experts) if chosen[:, place].any()]
    order = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in blocks)])
    edges = np.cumsum([0, *(len(ids) for ids, _ in blocks)])
    at = [slice(*pair) for pair in pairwise(edges.tolist())]
    squares, products = np.zeros((len(order), len(order))), np.zeros((len(order), len(sample.down)))

    def answers(tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return sample.hidden[np.ix_(tokens, ids)] * scale[tokens, None]

    for low, high in combinations_with_replacement(range(len(blocks)), 2):
        both = np.flatnonzero(blocks[low][1] & blocks[high][1])
        for start in range(0, len(both), PART):
            right = answers(both[start : start + PART], blocks[low][0])
            left = right if low == high else answers(both[start : start + PART], blocks[high][0])
            add_products(squares[at[high], at[low]], left, right)
    columns = [np.ascontiguousarray(sample.down[:, ids].T) for ids in experts]
    lost = 0.0
    for start in range(0, len(chosen), PART):
        missing = np.zeros((min(PART, len(chosen) - start), len(sample.down)), np.float32)
        for place, ids in enumerate(experts):
            absent = np.flatnonzero(~chosen[start : start + PART, place])
            missing[absent] += answers(absent + start, ids) @ columns[place]
        lost += float(np.einsum("td,td->", missing, missing, dtype=np.float64))
        for place, (ids, inside) in enumerate(blocks):
            present = np.flatnonzero(inside[start : start + PART])
            add_products(products[at[place]], answers(present + start, ids), missing[present])
    return RefitSums(order, squares, products, lost, max(len(chosen), 1))
