# SPDX-License-Identifier: Apache-2.0
"""First weights of a router by chance, and how alike its rows are. Needs no torch, so a random mixture loads none."""

from __future__ import annotations

import math

import numpy as np


def random_rows(shape: tuple[int, int, int], seed: int, uniform: bool) -> np.ndarray:
    """(layers, experts, hidden) float32: normal of deviation 1, or uniform within 1 / sqrt(hidden)."""
    source = np.random.Generator(np.random.Philox(seed))
    if not uniform:
        return source.standard_normal(shape, dtype=np.float32)
    bound = 1.0 / math.sqrt(shape[-1])
    return ((source.random(shape, dtype=np.float32) * 2 - 1) * bound).astype(np.float32)


def condition(rows: np.ndarray) -> float:
    """How alike the rows (experts, hidden) of a layer are: 1 for right angles, large for nearly equal rows."""
    return float(np.linalg.cond(rows.astype(np.float64)))
