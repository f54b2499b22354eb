# SPDX-License-Identifier: Apache-2.0
"""Token rows in groups of like content: hashed TF-IDF vectors and k-means. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUCKETS = 2048
ROUNDS = 50
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing with the golden ratio


def tfidf(rows: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (rows, BUCKETS) of length 1 from rows of token ids: how often a token occurs, weighed by how few rows
    have it (Salton and Buckley 1988), tokens hashed to buckets with a sign (Weinberger et al. 2009)."""
    counted = [np.unique(row, return_counts=True) for row in rows]
    tokens = np.concatenate([ids for ids, _ in counted]) if counted else np.zeros(0, np.int64)
    known, places, holders = np.unique(tokens, return_inverse=True, return_counts=True)
    rare = np.log((1 + len(rows)) / (1 + holders)) + 1
    hashed = known.astype(np.uint64) * _FACTOR
    bucket, sign = (hashed >> np.uint64(40)) % np.uint64(BUCKETS), 1.0 - 2.0 * (hashed >> np.uint64(63)).astype(float)
    found, start = np.zeros((len(rows), BUCKETS), np.float32), 0
    for row, (ids, counts) in enumerate(counted):
        here = places[start : start + len(ids)]
        np.add.at(found[row], bucket[here].astype(np.int64), (1 + np.log(counts)) * rare[here] * sign[here])
        start += len(ids)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def kmeans(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """int64 label of each of ``points`` (n, width), n >= ``clusters``; every cluster has some (Lloyd 1982, begun as
    Arthur and Vassilvitskii 2007)."""
    draws = np.random.default_rng(seed)
    centres = points[[int(draws.integers(len(points)))]]
    near = np.full(len(points), np.inf)
    while len(centres) < clusters:
        near = np.minimum(near, _distances(points, centres[-1:])[:, 0])
        total = near.sum()
        chance = near / total if total > 0 else np.full(len(points), 1 / len(points))
        centres = np.concatenate((centres, points[[int(draws.choice(len(points), p=chance))]]))
    labels = np.full(len(points), -1, np.int64)
    for _ in range(ROUNDS):
        distances = _distances(points, centres)
        found = _without_empty(distances, clusters)
        if np.array_equal(found, labels):
            break
        labels = found
        centres = np.stack([points[labels == one].mean(0) for one in range(clusters)])
    return labels


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (n, clusters)."""
    squares = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
    return np.maximum(squares, 0)


def _without_empty(distances: np.ndarray, clusters: int) -> np.ndarray:
    """The nearest centre of each point; an empty cluster takes the point farthest from its own that it may have."""
    labels = distances.argmin(1)
    for empty in np.flatnonzero(np.bincount(labels, minlength=clusters) == 0):
        counts = np.bincount(labels, minlength=clusters)
        own = np.where(counts[labels] > 1, distances[np.arange(len(labels)), labels], -1)
        labels[int(own.argmax())] = empty
    return labels
