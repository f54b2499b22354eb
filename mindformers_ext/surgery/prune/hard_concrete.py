# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete masks in numpy (Louizos et al. 2018, arXiv:1712.01312, section 2; constants of Sheared-LLaMA).

``loga`` is a mask's parameter, one per unit, (units) or (layers, units). All results are float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.pruning import EPS, HIGH, LOGA_LIMITS, LOW, SHARPNESS, TEMPERATURE, ZERO_SHIFT

Floats = npt.NDArray[np.float64]
NOISE_STREAM = 0x6C30  # keeps the masks' noise apart from other draws that follow from seed and step


def sigmoid(x: npt.ArrayLike) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    half = 0.5 * np.asarray(x, np.float64)
    return np.asarray(0.5 * (1.0 + np.tanh(half)))


def clamped(loga: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """The parameter inside its limits, in its own type."""
    given = np.asarray(loga)
    low, high = (np.asarray(limit, given.dtype) for limit in LOGA_LIMITS)
    return np.clip(given, low, high)


def noise(seed: int, step: int, sizes: Iterable[tuple[int, ...]]) -> list[npt.NDArray[np.float32]]:
    """Logistic noise ln u - ln(1 - u) for every mask of the update after ``step`` updates, float32.

    u is uniform between EPS and 1 - EPS, of numpy's Philox4x64-10 (Salmon et al. 2011) with the key (seed, step): the
    same whatever ran before and on whichever device.
    """
    key = np.array([(seed ^ NOISE_STREAM << 32) % 2**64, step % 2**64], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key))
    found = []
    for size in sizes:
        u = EPS + (1.0 - 2.0 * EPS) * draw.random(size)
        found.append((np.log(u) - np.log1p(-u)).astype(np.float32))
    return found


def stretched(loga: npt.ArrayLike, logistic: npt.ArrayLike) -> Floats:
    """The sampled mask before it is cut to 0 and 1."""
    y = sigmoid((np.asarray(logistic, np.float64) + np.asarray(loga, np.float64)) / TEMPERATURE)
    return np.asarray(LOW + (HIGH - LOW) * y)


def sample(loga: npt.ArrayLike, logistic: npt.ArrayLike) -> Floats:
    """A mask of training, from 0 to 1."""
    return np.clip(stretched(loga, logistic), 0.0, 1.0)


def score(loga: npt.ArrayLike) -> Floats:
    """P(mask > 0)."""
    below = sigmoid(ZERO_SHIFT - np.asarray(loga, np.float64))
    return np.asarray(1.0 - np.clip(below, EPS, 1.0 - EPS))


def sparsity(loga: npt.ArrayLike) -> Floats:
    """Expected share of units that are 0: (layers), or () of one vector."""
    return np.asarray(1.0 - score(loga).mean(-1))


def deterministic(loga: npt.ArrayLike, keep: int | None = None) -> Floats:
    """A mask without noise: the smallest values become exactly 0, the others keep their soft value.

    Args:
        loga: the parameter.
        keep: units that stay in every row; None: as many as are expected. Of equal ones the first goes first.
    """
    given = np.asarray(loga, np.float64)
    soft = sigmoid(SHARPNESS * given / TEMPERATURE)
    rows, chances = np.atleast_2d(soft).copy(), np.atleast_2d(score(given))
    for row, chance in zip(rows, chances, strict=True):
        zeros = len(row) - keep if keep is not None else round(float(len(row) - chance.sum()))
        row[np.argsort(row, kind="stable")[:zeros]] = 0.0
    return rows.reshape(soft.shape)
