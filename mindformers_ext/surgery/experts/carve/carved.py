# SPDX-License-Identifier: Apache-2.0
"""A carved layer: its experts, how they are chosen, its output matrix; and what a file's own way to weigh them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mindformers_ext.surgery.experts.carve.choose import Chooser, highest
from mindformers_ext.surgery.experts.split import LayerSplit

SPREAD = 3 * 2.0**-9  # standard deviation of the logits in a file: small, so that all weights are nearly one


@dataclass(frozen=True, eq=False)
class CarvedLayer:
    """``split``: what every token passes is its residual part. ``chooser`` None: no expert is ever chosen, a static
    cut. ``down`` (D, F); ``bias`` (D) is added. ``figures``: what is to be said of the layer."""

    split: LayerSplit
    chooser: Chooser | None
    down: np.ndarray
    bias: np.ndarray | None
    figures: Mapping[str, float]

    @property
    def always(self) -> np.ndarray:
        """The neurons that every token passes."""
        return always_of(self.split)

    def output(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """float32 (T, D) from what enters (T, D) and all neurons' answers (T, F): the plain sum of what is chosen."""
        found = hidden[:, self.always] @ self.down[:, self.always].T
        if self.chooser is not None:
            chosen = self.chooser.choose(x, hidden)
            for place, ids in enumerate(self.split.experts):
                tokens = np.flatnonzero(chosen[:, place])
                found[tokens] += hidden[np.ix_(tokens, ids)] @ self.down[:, ids].T
        return found if self.bias is None else found + self.bias


def always_of(split: LayerSplit) -> np.ndarray:
    """The neurons of the residual experts, one after the other."""
    return np.concatenate((np.zeros(0, np.int64), *split.residual))


@dataclass(frozen=True)
class WeightError:
    """By how much a file's weights, A softmax(x r)_j over the chosen, are off one: on average and at most. ``same``:
    the share of tokens whose choice by float32 probabilities is that by logits."""

    mean: float
    largest: float
    same: float


def file_rows(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 (E, D): router rows that choose as ``rows`` do, with weights near one after a softmax.

    Less their mean, which no softmax sees, and times a power of two, so that the logits of x (T, D) spread by about
    ``SPREAD``.
    """
    centred = rows - rows.mean(0, keepdims=True)
    spread = float(np.std(x @ centred.astype(np.float32).T, dtype=np.float64))
    if spread > 0:
        centred = centred * 2.0 ** np.round(np.log2(SPREAD / spread))
    return centred.astype(np.float32)


def weight_error(x: np.ndarray, rows: np.ndarray, count: int) -> WeightError:
    """Of the tokens x (T, D), as a file computes it: logits, probabilities, the ``count`` highest, made to sum to 1."""
    logits = x @ rows.T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    chosen = highest(shares, count)
    weights = count * shares / (shares * chosen).sum(1, keepdims=True)
    off = np.abs(weights[chosen] - 1.0)
    same = (chosen == highest(logits, count)).all(1)
    return WeightError(float(off.mean(dtype=np.float64)), float(off.max()), float(same.mean()))
