# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the way along a sphere, shared by slerp and nuslerp. Source: Shoemake 1985."""

from __future__ import annotations

import math

import torch

NEARLY_PARALLEL = 0.9995  # |cos| above this: the straight line (the angle's sine would divide by almost nothing)
SMALL_NORM = 1e-8  # vectors shorter than this are not normalised


def shares(
    t: float, dot: float, first_norm: float, second_norm: float, parallel: float = NEARLY_PARALLEL
) -> tuple[float, float]:
    """What of the first and of the second vector lies at ``t`` of the way, from their dot product and norms.

    The weights apply to the vectors as they are, not to unit vectors. ``t`` is not clamped. A cosine beyond
    ``parallel`` takes the straight line.
    """
    first = first_norm if first_norm > SMALL_NORM else 1.0
    second = second_norm if second_norm > SMALL_NORM else 1.0
    cosine = max(-1.0, min(1.0, dot / first / second))
    if abs(cosine) > parallel:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def mixed(first: torch.Tensor, second: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    """``weights[0] * first + weights[1] * second`` of float tensors; an end point comes back as it is, bit by bit."""
    if weights == (1.0, 0.0):
        return first
    if weights == (0.0, 1.0):
        return second
    return torch.add(first * weights[0], second * weights[1])


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def inner(first: torch.Tensor, second: torch.Tensor) -> float:
    """The dot product of all elements; float32 products of a row, float64 between rows."""
    return float(torch.linalg.vecdot(first, second, dim=-1).to(torch.float64).sum())
