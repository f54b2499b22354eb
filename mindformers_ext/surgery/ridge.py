# SPDX-License-Identifier: Apache-2.0
"""Damped least squares in float64, in the memory of the matrix itself: (S + d mean(diag S) I)^-1 P, S symmetric.

Blocked, so that almost all of the work is products of matrices; nothing of S's size is made beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Real = npt.NDArray[Any]
BLOCK = 256
TINY = 1e-30  # a matrix of zeros has a solution too: zeros


def add_products(sums: Floats, left: np.ndarray, right: np.ndarray) -> None:
    """Add left' right of float32 (T, n) and (T, m) to ``sums`` (n, m): products in float32, the sum in float64."""
    sums += left.T @ right


def factor(squares: Floats, damping: float) -> tuple[Floats, float]:
    """The lower Cholesky factor of the damped matrix (n, n), in place of its lower triangle, which alone is read; and
    what was added to the diagonal.

    Raises:
        np.linalg.LinAlgError: the matrix is not positive semidefinite, or holds values that are no numbers.
    """
    diagonal = np.einsum("ii->i", squares)
    added = damping * float(diagonal.mean()) + TINY
    diagonal += added
    for start in range(0, len(squares), BLOCK):
        end = min(start + BLOCK, len(squares))
        squares[start:, start:end] -= squares[start:, :start] @ squares[start:end, :start].T
        head = np.linalg.cholesky(squares[start:end, start:end])
        squares[start:end, start:end] = head
        squares[end:, start:end] = _triangular(head, np.ascontiguousarray(squares[end:, start:end].T)).T
    return squares, added


def solve(lower: Floats, wanted: Floats) -> Floats:
    """The solution (n, m), in place of ``wanted``, by what ``factor`` has made."""
    return backward(lower, forward(lower, wanted))


def forward(lower: Floats, wanted: Real) -> Real:
    """L^-1 P (n, m), in place of P, in its type. Its sum of squares is the sum of the solution times P."""
    for start in range(0, len(lower), BLOCK):
        end = min(start + BLOCK, len(lower))
        wanted[start:end] -= lower[start:end, :start].astype(wanted.dtype, copy=False) @ wanted[:start]
        wanted[start:end] = _triangular(lower[start:end, start:end], wanted[start:end])
    return wanted


def backward(lower: Floats, wanted: Real) -> Real:
    """L'^-1 P (n, m), in place of P, in its type."""
    for start in reversed(range(0, len(lower), BLOCK)):
        end = min(start + BLOCK, len(lower))
        wanted[start:end] -= lower[end:, start:end].astype(wanted.dtype, copy=False).T @ wanted[end:]
        wanted[start:end] = _triangular(lower[start:end, start:end].T, wanted[start:end], upper=True)
    return wanted


def _triangular(matrix: np.ndarray, wanted: np.ndarray, upper: bool = False) -> np.ndarray:
    """matrix^-1 wanted of a small triangular matrix, of which the other triangle is not read."""
    left = torch.from_numpy(matrix.astype(wanted.dtype, copy=False))
    found = torch.linalg.solve_triangular(left, torch.from_numpy(wanted), upper=upper)
    return np.asarray(found.numpy())
