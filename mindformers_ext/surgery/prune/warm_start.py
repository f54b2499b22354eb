# SPDX-License-Identifier: Apache-2.0
"""Masks that begin in the order of scores: the weaker a unit, the nearer its mask is to 0 from the start.

Of n units the parameter falls in a straight line with the rank, from its upper limit, so steeply that the expected
sparsity is the one that the target begins with; what would fall below the lower limit stays there.
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.core.pruning import LOGA_LIMITS
from mindformers_ext.surgery.prune.hard_concrete import Floats, sparsity

STEEPEST, HALVINGS = 1e6, 80


def ordered_loga(scores: Floats, start: float) -> Floats:
    """Parameters (..., n) of expected sparsity ``start`` in every row, in the order of scores (..., n); of equal ones
    the lower number is the stronger."""
    count = scores.shape[-1]
    order = np.argsort(-scores, axis=-1, kind="stable")
    rank = np.empty(scores.shape)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(1, count + 1) / count, scores.shape), axis=-1)
    low, high = LOGA_LIMITS
    ranks = np.arange(1, count + 1) / count
    flat, steep = 0.0, STEEPEST
    for _ in range(HALVINGS):
        middle = (flat + steep) / 2
        if float(sparsity(np.maximum(high - middle * ranks, low))) < start:
            flat = middle
        else:
            steep = middle
    return np.asarray(np.maximum(high - steep * rank, low))
