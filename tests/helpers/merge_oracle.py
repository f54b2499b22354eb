# SPDX-License-Identifier: Apache-2.0
"""The merge methods once more, whole tensors in float64 with numpy, written from their formulas alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def linear(xs: Arrays, weights: Sequence[float], normalize: bool = True) -> np.ndarray:
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def slerp(base: np.ndarray, other: np.ndarray, t: float, parallel: float = 0.9995) -> np.ndarray:
    a, b = base.ravel(), other.ravel()
    norms = [n if n > 1e-8 else 1.0 for n in (np.linalg.norm(a), np.linalg.norm(b))]
    cosine = np.clip(a @ b / norms[0] / norms[1], -1, 1)
    if abs(cosine) > parallel:
        return (1 - t) * base + t * other
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * other) / np.sin(angle)


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """Keep the k largest magnitudes, of equal ones the first."""
    if density >= 1:
        return delta
    if density <= 0:
        return np.zeros_like(delta)
    k = max(1, int(density * delta.size))
    mask = np.zeros(delta.size, bool)
    mask[np.argsort(-np.abs(delta.ravel()), kind="stable")[:k]] = True
    return delta * mask.reshape(delta.shape)


def band(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Drop the floor(gamma n) largest, keep the next floor(density n)."""
    order = np.argsort(-np.abs(delta.ravel()), kind="stable")
    keep, top = int(density * delta.size), int(gamma * delta.size)
    top = min(top, delta.size - keep)
    mask = np.zeros(delta.size, bool)
    mask[order[top : top + keep]] = True
    return delta * mask.reshape(delta.shape)


def combine(
    base: np.ndarray, deltas: Arrays, weights: Sequence[float], *, elect: bool, normalize: bool, factor: float = 1.0
) -> np.ndarray:
    """Base plus the weighted sum of (sparse) task vectors, signs elected or not."""
    terms = [w * d for w, d in zip(weights, deltas, strict=True)]
    if elect:
        sign = np.where(sum(terms) >= 0, 1, -1)
        agree = [np.sign(term) == sign for term in terms]
        delta = sum(term * mask for term, mask in zip(terms, agree, strict=True))
        total = sum(w * mask for w, mask in zip(weights, agree, strict=True))
        total = np.where(total == 0, 1, total)
    else:
        delta, total = sum(terms), sum(weights)
        total = total if abs(total) >= 1e-8 else 1.0
    return base + factor * (delta / total if normalize else delta)


def model_stock(base: np.ndarray, xs: Arrays, by_row: bool = False) -> np.ndarray:
    if by_row:
        return np.stack([model_stock(base[i], [x[i] for x in xs]) for i in range(len(base))])
    deltas = [(x - base).ravel() for x in xs]
    n = len(deltas)
    cosines = [
        deltas[i] @ deltas[j] / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
        for i in range(n)
        for j in range(i)
    ]
    c = np.mean(cosines)
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(xs, axis=0) + (1 - t) * base


def sce(base: np.ndarray, xs: Arrays, top: float) -> np.ndarray:
    deltas = [x - base for x in xs]
    if top < 1:
        mask = trim(np.var(deltas, axis=0), top) != 0
        deltas = [d * mask for d in deltas]
    energy = np.array([np.mean(d**2) for d in deltas])
    weights = energy / energy.sum()
    sign = np.where(sum(deltas) >= 0, 1, -1)
    agree = [np.sign(d) == sign for d in deltas]
    total = sum(w * m for w, m in zip(weights, agree, strict=True))
    return base + sum(w * m * d for w, m, d in zip(weights, agree, deltas, strict=True)) / np.maximum(total, 1e-6)
