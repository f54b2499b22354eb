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

PART = 4096  # tokens whose answers are put in the experts' order at once


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
        """The new matrix (D, F), float32. The sums are used up: their memory is the solution's."""
        lower, added = factor(self.squares, ridge)
        half = forward(lower, self.products)
        gained = float(np.einsum("nd,nd->", half, half))
        change = backward(lower, half)
        new = down.copy()
        new[:, self.neurons] += change.T
        left = self.lost - gained - added * float(np.einsum("nd,nd->", change, change))
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
    used = [place for place in range(len(experts)) if chosen[:, place].any()]
    blocks = [ids for ids in (always, *(experts[place] for place in used)) if len(ids)]
    mine = ([np.ones(len(chosen), bool)] if len(always) else []) + [chosen[:, place] for place in used]
    order = np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
    edges = np.concatenate(([0], np.cumsum([len(ids) for ids in blocks]))).astype(int)
    at = [slice(*pair) for pair in pairwise(edges)]
    squares, products = np.zeros((len(order), len(order))), np.zeros((len(order), len(sample.down)))
    lost = 0.0
    for start in range(0, len(chosen), PART):
        part = slice(start, min(start + PART, len(chosen)))
        scale = np.sqrt(sample.weights[part])[:, None].astype(np.float32)
        missing = _missing(sample, experts, chosen, part) * scale
        lost += float(np.square(missing, dtype=np.float64).sum())
        answers = sample.hidden[part][:, order] * scale
        inside = [mask[part] for mask in mine]
        for low, high in combinations_with_replacement(range(len(blocks)), 2):
            both = inside[low] & inside[high]
            right = answers[both, at[low]]
            left = right if low == high else answers[both, at[high]]
            add_products(squares[at[high], at[low]], left, right)
        for place, mask in enumerate(inside):
            add_products(products[at[place]], answers[mask, at[place]], missing[mask])
    return RefitSums(order, squares, products, lost, max(len(chosen), 1))


def _missing(sample: LayerSample, experts: Sequence[np.ndarray], chosen: np.ndarray, part: slice) -> np.ndarray:
    """float32 (tokens, D): what the experts would add that are not chosen."""
    found = np.zeros((part.stop - part.start, len(sample.down)), np.float32)
    for place, ids in enumerate(experts):
        absent = np.flatnonzero(~chosen[part, place])
        found[absent] += sample.hidden[np.ix_(absent + part.start, ids)] @ sample.down[:, ids].T
    return found
