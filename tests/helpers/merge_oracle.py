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


def nearswap(base: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    share = np.clip(t / np.maximum(np.abs(base - other), 1e-6), 0, 1)
    return share * other + (1 - share) * base


def ram(base: np.ndarray, xs: Arrays, epsilon: float, factors: Sequence[float] | None = None) -> np.ndarray:
    """``factors``: of what a model changed alone."""
    result = base.copy()
    for place in np.ndindex(base.shape):
        changes = [(m, x[place] - base[place]) for m, x in enumerate(xs) if abs(x[place] - base[place]) > epsilon]
        if len(changes) == 1:
            result[place] += changes[0][1] * (factors[changes[0][0]] if factors else 1)
        elif changes:
            result[place] += sum(change for _, change in changes) / len(changes)
    return result


def ramplus_factors(base: np.ndarray, xs: Arrays, epsilon: float, r: float, alpha: float) -> list[float]:
    changed = np.stack([np.abs(x - base) > epsilon for x in xs])
    count = changed.sum(0)
    factors = []
    for mask in changed:
        shared, alone = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
        factors.append(1 + r * min(alpha, shared / max(alone, epsilon)))
    return factors


def arcee_fusion(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    rows, others = np.atleast_2d(base), np.atleast_2d(other)

    def probabilities(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = probabilities(others), probabilities(rows)
    importance = np.abs(others - rows) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(quartile * (ordered.size - 1))] for quartile in (0.25, 0.5, 0.75))
    keep = importance >= median + 1.5 * (third - first)
    return np.where(keep, others, rows).reshape(base.shape)


def multislerp(xs: Arrays, weights: Sequence[float], base: np.ndarray | None = None) -> np.ndarray:
    """With the way through the tangent space at the mean, step by step."""
    start = np.zeros_like(xs[0]) if base is None else base
    vectors = np.stack([(x - start).ravel() for x in xs])
    shares = np.array(weights) / np.sum(weights)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / (norms[:, None] + 1e-8)
    mean = shares @ units
    mean /= np.linalg.norm(mean)
    tangents = units - (units @ mean)[:, None] * mean
    tangent = shares @ tangents
    length = np.linalg.norm(tangent) + 1e-8
    point = mean * np.cos(length) + tangent * np.sin(length) / length
    return start + (point * (norms @ shares)).reshape(start.shape)


def karcher(xs: Arrays, steps: int = 10, tol: float = 1e-5) -> np.ndarray:
    vectors = [x.ravel() for x in xs]
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True) if n > tol]
    u = np.mean(units, axis=0)
    u = u / np.linalg.norm(u)
    for _ in range(steps):
        tangent = np.zeros_like(u)
        for unit in units:
            angle = np.arccos(np.clip(u @ unit, -1, 1))
            if angle >= tol:
                tangent += angle / np.sin(angle) * (unit - np.cos(angle) * u) / len(units)
        length = np.linalg.norm(tangent)
        if length < tol:
            break
        u = np.cos(length) * u + np.sin(length) * tangent / length
        u = u / np.linalg.norm(u)
    return (np.mean(norms) * u).reshape(xs[0].shape)
