# SPDX-License-Identifier: Apache-2.0
"""What balanced clusters make as large as they can, in terms of S_e, the sum of a cluster's rows.

l2: sum |S_e|^2 / size, which is a constant minus the inertia. cos: sum |S_e|, the sum of the rows' cosines to their
centre where rows have length 1 (spherical k-means, Dhillon and Modha 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

METRICS = ("l2", "cos")


@dataclass(frozen=True)
class Objective:
    """metric: one of ``METRICS``. size: rows of a cluster."""

    metric: str
    size: int

    def of_squares(self, squares: np.ndarray) -> np.ndarray:
        """Each cluster's part, from |S_e|^2."""
        return squares / self.size if self.metric == "l2" else np.sqrt(np.maximum(squares, 0))

    def slope(self, squares: np.ndarray) -> np.ndarray:
        """How fast each cluster's part grows with |S_e|^2, at most."""
        if self.metric == "l2":
            return np.full(len(squares), 1 / self.size)
        return 0.5 / np.sqrt(np.maximum(squares, 1e-12))

    def value(self, sums: np.ndarray) -> float:
        """The objective, from ``sums`` (E, width)."""
        return float(self.of_squares(np.einsum("ij,ij->i", sums, sums)).sum())

    def centres(self, sums: np.ndarray) -> np.ndarray:
        """(E, width): a row's score for a cluster is its product with the centre."""
        if self.metric == "l2":
            return sums / self.size
        norms = np.sqrt(np.einsum("ij,ij->i", sums, sums))
        return sums / np.where(norms > 0, norms, 1)[:, None]

    def inertia(self, x: np.ndarray, sums: np.ndarray) -> float:
        """Sum of squared distances (l2) or of 1 - cosine (cos) of the rows ``x`` to their centres."""
        squares = float(np.einsum("ij,ij->", x, x, dtype=np.float64)) if self.metric == "l2" else float(len(x))
        return squares - self.value(sums)
