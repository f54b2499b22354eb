# SPDX-License-Identifier: Apache-2.0
"""Output matrices fitted anew to what a cut has left of their inputs, by least squares from second moments, float64.

A matrix W (O, n) gave W h; of h (n) the places ``kept`` stay. The fit is the V (O, k) with the smallest
sum_t w_t |W h_t - V h_t[kept]|^2 + ridge |V - W[:, kept]|^2, so its first term is never above that of the plain cut.
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.surgery.prune.cut import Indices
from mindformers_ext.surgery.prune.hard_concrete import Floats
from mindformers_ext.surgery.ridge import factor, solve

NONE, LEAST_SQUARES = REFITS = ("none", "least_squares")  # whether output matrices are fitted anew
RIDGE = 0.03  # of the mean square of the inputs that stay


def add_moments(moments: Floats, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Add sum_t w_t h_t h_t^T of inputs (T, n) to ``moments`` (n, n), in place.

    w_t is one over the square length of ``outputs`` (T, D), the hidden state behind the matrix: a norm follows, so that
    an error counts as a share of it, and a few tokens of huge states do not decide everything.
    """
    length = np.linalg.norm(outputs.astype(np.float64), axis=1)
    weighed = inputs / np.maximum(length, np.finfo(np.float32).tiny)[:, None]
    moments += weighed.T @ weighed


def fitted(moments: Floats, weight: np.ndarray, kept: Indices, ridge: float = RIDGE) -> Floats:
    """V (O, k), by one solve."""
    inner = moments[np.ix_(kept, kept)]
    plain = weight[:, kept].astype(np.float64)
    if not np.trace(inner) > 0:  # the inputs that stay never answered: nothing to fit by
        return plain
    gone = np.setdiff1d(np.arange(len(moments)), kept)
    wanted = moments[np.ix_(kept, gone)] @ weight[:, gone].astype(np.float64).T
    return np.asarray(plain + solve(factor(inner, ridge)[0], wanted).T)


def relative_error(moments: Floats, weight: np.ndarray, kept: Indices, chosen: np.ndarray) -> float:
    """sum_t w_t |W h_t - V h_t[kept]|^2 over sum_t w_t |W h_t|^2, of ``chosen`` V (O, k)."""
    whole = weight.astype(np.float64)
    left = whole.copy()
    left[:, kept] -= chosen
    return float(((left @ moments) * left).sum() / max(((whole @ moments) * whole).sum(), np.finfo(np.float64).tiny))
