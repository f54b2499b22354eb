# SPDX-License-Identifier: Apache-2.0
"""Neurons grouped by when they are among those of the largest answers (CMoE, arXiv:2502.04416, section 3).

A marker a_ti is 1 on a token's K neurons of largest |h_ti|. The distance of a neuron's markers to a centre q,
sum_t |a_ti - q_t|, is sum_t q_t + sum of 1 - 2 q_t over the tokens it is marked at.
"""

from __future__ import annotations

import numpy as np
import torch

from mindformers_ext.surgery.experts.assign import assign
from mindformers_ext.surgery.experts.carve.sample import LayerSample, top
from mindformers_ext.surgery.ridge import Floats

SHARE = 10  # one neuron of so many is marked


class Markers:
    """The markers of a layer, bool (T, F)."""

    def __init__(self, sample: LayerSample) -> None:
        self.sample = sample
        tokens, width = sample.hidden.shape
        count = max(1, width // SHARE)
        self.marks = np.zeros((tokens, width), bool)
        for part in sample.parts():
            found = torch.from_numpy(sample.hidden[part]).abs().topk(count, dim=1, sorted=False).indices
            torch.from_numpy(self.marks[part]).scatter_(1, found, True)

    def rates(self) -> Floats:
        """(F): how often each neuron is marked, in tokens."""
        return np.asarray(self.marks.sum(0, dtype=np.float64))

    def distances(self, centres: np.ndarray) -> Floats:
        """(E, F): of every neuron to the centres (T, E)."""
        found = np.zeros((centres.shape[1], self.marks.shape[1]))
        for part in self.sample.parts():
            found += (1 - 2 * centres[part]).astype(np.float32).T @ self.marks[part].astype(np.float32)
        return found + centres.sum(0, dtype=np.float64)[:, None]

    def groups(self, rest: np.ndarray, experts: int) -> np.ndarray:
        """int64 (len(rest)): the group of each of the neurons ``rest``, all of one size: those marked most often are
        the centres of one exact assignment."""
        first = rest[top(self.rates()[rest], experts)]
        gains = -self.distances(self.marks[:, first].astype(np.float32))[:, rest]
        return assign(gains, np.full(experts, len(rest) // experts))[0]

    def representatives(self, experts: tuple[np.ndarray, ...]) -> np.ndarray:
        """int64 (E): of each expert the neuron nearest to the mean of its neurons' markers."""
        centres = np.stack([self.marks[:, ids].mean(1, dtype=np.float32) for ids in experts], 1)
        distances = self.distances(centres)
        return np.array([ids[distances[place, ids].argmin()] for place, ids in enumerate(experts)])
