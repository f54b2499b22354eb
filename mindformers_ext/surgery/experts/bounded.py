# SPDX-License-Identifier: Apache-2.0
"""k-means with clusters of sizes between two bounds, assigned exactly in every pass (Bradley, Bennett, Demiriz 2000,
Constrained K-Means Clustering, MSR-TR-2000-65): the gates of LLaMA-MoE v2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts.assign_within import assign_within
from mindformers_ext.surgery.experts.cluster import check_finite, spread_rows

METRICS = ("l2", "cos")
TOLERANCE = 1e-3  # of the columns' mean variance: centres that move less, all together, stay
TRIED = 8192  # rows on which beginnings are tried


@dataclass(frozen=True, eq=False)
class BoundedClusters:
    """labels: int64 (n,). centres: float32 (E, D), means of the rows. inertia: squared distances, or 1 - cosine."""

    labels: np.ndarray
    centres: np.ndarray
    inertia: float
    passes: int


def size_bounds(rows: int, clusters: int, jitter: float) -> tuple[int, int]:
    """The least and the most rows of a cluster; ``jitter`` 0: as equal as can be."""
    spread = max(0.0, jitter)
    least = max(0, math.floor(rows / clusters * (1 - spread)))
    return least, min(rows, math.ceil(rows / clusters * (1 + spread)))


def bounded_clusters(
    rows: np.ndarray,
    clusters: int,
    jitter: float = 0.1,
    metric: str = "l2",
    seed: int = 0,
    starts: int = 10,
    passes: int = 100,
) -> BoundedClusters:
    """Rows in clusters whose sizes keep to ``size_bounds``.

    Args:
        rows: float32 (n, D), as they are.
        metric: "l2", squared distance to a centre; "cos", 1 - cosine. Centres are plain means in both.
        starts: beginnings (k-means++), tried on ``TRIED`` rows; the best goes on with all.
        passes: at most.

    Raises:
        UserError: fewer rows than clusters, an unknown metric, or values that are no numbers.
    """
    if len(rows) < clusters or clusters < 1:
        raise UserError(f"{len(rows)} tokens for {clusters} clusters: give more text, or fewer --num_experts")
    if metric not in METRICS:
        raise UserError(f"metric '{metric}' is unknown: choose one of {', '.join(METRICS)}")
    check_finite(rows)
    rng = np.random.default_rng(seed)
    few = rows if len(rows) <= TRIED else rows[np.sort(rng.choice(len(rows), max(TRIED, clusters), replace=False))]
    begun = []
    for _ in range(max(starts, 1)):
        norms = np.einsum("ij,ij->i", few, few)
        centres = few[spread_rows(few, norms, clusters, rng)]
        begun.append(_settle(few, centres, jitter, metric, passes))
    best = min(begun, key=lambda found: found.inertia)
    return best if few is rows else _settle(rows, best.centres, jitter, metric, passes)


def _settle(rows: np.ndarray, centres: np.ndarray, jitter: float, metric: str, passes: int) -> BoundedClusters:
    """Passes until the centres stay."""
    clusters, limit = len(centres), TOLERANCE * float(rows.var(axis=0).mean())
    least, most = size_bounds(len(rows), clusters, jitter)
    labels, done, moved = np.zeros(len(rows), np.int64), 0, np.inf
    while moved > limit and done < max(passes, 1):
        done += 1
        labels = assign_within(_scores(rows, centres, metric), least, most)
        new = _means(rows, labels, centres)
        moved, centres = float(((new - centres) ** 2).sum()), new
    own = _scores(rows, centres, metric)[labels, np.arange(len(rows))].astype(np.float64)
    cost = np.einsum("ij,ij->", rows, rows, dtype=np.float64) if metric == "l2" else len(rows)
    return BoundedClusters(labels, centres.astype(np.float32), float(cost - own.sum()), done)


def _scores(rows: np.ndarray, centres: np.ndarray, metric: str) -> np.ndarray:
    """(E, n): minus the squared distance but for the row's own length, or the cosine."""
    product = centres.astype(np.float32) @ rows.T
    if metric == "l2":
        return 2 * product - (centres.astype(np.float64) ** 2).sum(1)[:, None].astype(np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    own = np.linalg.norm(centres, axis=1)
    return product / np.maximum(lengths, 1e-30)[None] / np.maximum(own, 1e-30)[:, None]


def _means(rows: np.ndarray, labels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """float64 (E, D); an empty cluster stays where it was."""
    member = (labels == np.arange(len(before))[:, None]).astype(np.float32)
    count = member.sum(1)
    sums = (member @ rows).astype(np.float64)
    return np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], before)
