# SPDX-License-Identifier: Apache-2.0
"""What a pass has measured of one layer's feed-forward part, and sums over its tokens, each counting by a weight.

Sizes: T tokens, D the hidden state, F neurons. Neuron i answers h_i = silu(g_i x) (u_i x) and adds h_i D_i, D_i being
column i of down. Products are float32, over a part of the tokens at a time; sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mindformers_ext.surgery.ridge import Floats

PART = 512  # tokens whose answers are worked on at once


@dataclass(frozen=True, eq=False)
class LayerSample:
    """``x`` (T, D), what enters the part, and ``hidden`` (T, F), the neurons' answers, float32. ``weights`` (T): how
    much a token's squares count. ``rows`` (T): the row of text of each token. gate, up (F, D), down (D, F)."""

    x: np.ndarray
    hidden: np.ndarray
    weights: Floats
    rows: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray

    def parts(self) -> Iterator[slice]:
        """Slices of the tokens."""
        for start in range(0, len(self.x), PART):
            yield slice(start, min(start + PART, len(self.x)))

    def column_squares(self) -> Floats:
        """|D_i|^2 (F)."""
        return np.einsum("di,di->i", self.down, self.down, dtype=np.float64)

    def energies(self) -> Floats:
        """(F): sum_t w_t h_ti^2 |D_i|^2, what each neuron adds."""
        return self.sums_where(np.ones((len(self.x), 1), np.float32))[0]

    def sums_where(self, chosen: np.ndarray) -> Floats:
        """(E, F): sum_t s_tj w_t h_ti^2 |D_i|^2 for s (T, E)."""
        total = np.zeros((chosen.shape[1], self.hidden.shape[1]))
        for part in self.parts():
            weighed = (chosen[part] * self.weights[part, None]).astype(np.float32)
            total += weighed.T @ np.square(self.hidden[part])
        return total * self.column_squares()

    def group_energies(self, labels: np.ndarray, groups: int) -> np.ndarray:
        """float32 (T, groups): sum of w_t h_ti^2 |D_i|^2 over the neurons of each group; a label below 0 is of none."""
        inside = np.flatnonzero(labels >= 0)
        of = np.zeros((len(labels), groups), np.float32)
        of[inside, labels[inside]] = self.column_squares()[inside]
        found = np.empty((len(self.x), groups), np.float32)
        for part in self.parts():
            found[part] = (np.square(self.hidden[part]) @ of) * self.weights[part, None]
        return found

    def moments(self) -> tuple[Floats, Floats]:
        """Mean and variance (F) of the answers over all tokens, each counting the same."""
        total, squares = np.zeros(self.hidden.shape[1]), np.zeros(self.hidden.shape[1])
        for part in self.parts():
            answers = self.hidden[part].astype(np.float64)
            total += answers.sum(0)
            squares += np.square(answers).sum(0)
        mean = total / len(self.x)
        return mean, np.maximum(squares / len(self.x) - np.square(mean), 0.0)


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """int64 (count), rising: the places of the highest scores; of equal ones the lower."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
