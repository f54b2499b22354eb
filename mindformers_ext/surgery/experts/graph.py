# SPDX-License-Identifier: Apache-2.0
"""Neurons to experts by co-activation: a graph whose edges say how much two neurons fire together, cut into parts.

The graph is the reference's: per shard of features h (tokens, width) A += min(h^T h, threshold); A is divided by 0.99
of its first percentile above 0 (of 10, 20, ..., 100); an edge is what is at least 1 then, its weight the whole part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts.cluster import balanced_clusters
from mindformers_ext.surgery.experts.words import KERNELS

PERCENTILES = tuple(range(10, 101, 10))
HEAVIEST = 10**6  # weight of an edge; METIS adds weights up in 32 bits
ROWS = 1024  # of the graph that are looked at together
ITERATIONS = 12  # of the eigenvectors


def coactivation(shards: Iterable[np.ndarray], width: int, kernel: str, threshold: float) -> np.ndarray:
    """float32 (width, width); a shard is (tokens, width). One such matrix is held, and blocks of rows."""
    total = np.zeros((width, width), np.float32)
    for shard in shards:
        if shard.ndim != 2 or shard.shape[1] != width:
            raise UserError(
                f"features of shape {shard.shape} are not of a layer with {width} neurons: give this model's"
            )
        h = KERNELS[kernel](shard.astype(np.float32))
        for start in range(0, width, ROWS):
            block = slice(start, start + ROWS)
            total[block] += np.minimum(h[:, block].T @ h, np.float32(threshold))
    return total


def edge_weights(total: np.ndarray) -> np.ndarray:
    """int32 (width, width), symmetric, 0 on the diagonal and where there is no edge; ``total`` is used up.

    Raises:
        UserError: no two neurons fire together.
    """
    steps = np.percentile(total, PERCENTILES)
    above = steps[steps > 0]
    if not above.size:
        raise UserError("no two neurons are active together in these features: compute them on more text")
    total /= np.float32(0.99 * above[0])
    weights = np.minimum(total, HEAVIEST).astype(np.int32)
    np.maximum(weights, 0, out=weights)
    weights = np.minimum(weights, weights.T)  # products of blocks differ in the last digit
    np.fill_diagonal(weights, 0)
    if not weights.any():
        raise UserError("no two neurons are active together in these features: compute them on more text")
    return weights


def metis_lines(weights: np.ndarray) -> Iterator[str]:
    """The graph as METIS reads it: "neurons edges 001", then per neuron its neighbours (from 1) and their weights."""
    yield f"{len(weights)} {int(np.count_nonzero(weights)) // 2} 001"
    for row in weights:
        near = np.flatnonzero(row)
        yield " ".join(map(str, np.stack((near + 1, row[near]), 1).reshape(-1).tolist()))


def spectral_parts(weights: np.ndarray, parts: int, seed: int | Sequence[int]) -> np.ndarray:
    """Labels (width,) of equal parts: balanced clusters of the leading eigenvectors of the normalised graph, in which
    each neuron is a row of length 1 (Ng, Jordan and Weiss 2001)."""
    rng = np.random.default_rng(seed)
    degree = weights.sum(1, dtype=np.float64)
    scale = (1 / np.sqrt(np.where(degree > 0, degree, np.inf))).astype(np.float32)
    graph = weights.astype(np.float32)
    graph *= scale
    graph *= scale[:, None]
    vectors = rng.standard_normal((len(weights), parts + 4), dtype=np.float32)
    for _ in range(ITERATIONS):
        vectors, _ = np.linalg.qr(graph @ vectors + vectors)  # shifted: the most negative are not the largest
    return balanced_clusters(np.ascontiguousarray(vectors[:, :parts]), parts, seed=seed).labels


def rebalance(labels: np.ndarray, parts: int, weights: np.ndarray, seed: int | Sequence[int]) -> np.ndarray:
    """Labels of equal parts: parts that are too large give away the members that are least connected to them, to the
    part with room to which each is most connected; equal ones by lot."""
    result = np.array(labels, np.int64)
    size = len(result) // parts
    lot = np.random.default_rng(seed).permutation(len(result))
    counts = np.bincount(result, minlength=parts)
    links = np.stack([weights[:, result == part].sum(1, dtype=np.int64) for part in range(parts)], 1)
    for part in np.flatnonzero(counts > size):
        members = np.flatnonzero(result == part)
        leaving = members[np.lexsort((lot[members], links[members, part]))][: counts[part] - size]
        for neuron in leaving:
            room = np.flatnonzero(counts < size)
            there = int(room[links[neuron, room].argmax()])
            result[neuron] = there
            counts[there] += 1
            counts[part] -= 1
            links[:, part] -= weights[:, neuron]
            links[:, there] += weights[:, neuron]
    return result


def cut_weight(weights: np.ndarray, labels: np.ndarray) -> int:
    """Sum of the weights of edges between parts."""
    inside = sum(int(weights[np.ix_(ids, ids)].sum(dtype=np.int64)) for ids in map(np.flatnonzero, _members(labels)))
    return (int(weights.sum(dtype=np.int64)) - inside) // 2


def _members(labels: np.ndarray) -> Iterator[np.ndarray]:
    return (labels == part for part in np.unique(labels))
