# SPDX-License-Identifier: Apache-2.0
"""Balanced k-means: rows into clusters of one size, with an exact assignment in every pass.

Sizes are fixed, so sum |x_i - c|^2 = const - sum_e |S_e|^2 / size, where S_e is the sum of a cluster's rows, and the
best assignment to given centres is the transportation problem of ``assign``. Restarts run in a random projection onto
the leading directions of the data, where a pass costs little; the best of them go on in the full space, and pairs of
rows change places where that raises the sum (``exchange``), which leaves fixed points of the passes behind.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts.assign import assign
from mindformers_ext.surgery.experts.exchange import exchange
from mindformers_ext.surgery.experts.objective import METRICS, Objective
from mindformers_ext.surgery.experts.split import expert_size

STARTS = 10
PASSES = 500
PROJECTION, WIDER = 128, 64  # directions in which restarts run, and one more for so many columns
REFINED = 2  # restarts that go on in the full space
ROUGH, FINE = 1e-4, 1e-8  # a pass that raises the sum by less, relatively, is the last one
POLISHED = 1e-5  # a round of exchanges that raises it by less is the last one
ROUNDS = 8  # of exchanges and passes behind them
BLOCK = 1024  # rows that are looked at together where a whole copy of the matrix would be made


@dataclass(frozen=True)
class Clusters:
    """labels: int64 (n,). inertia: sum of squared distances of the unit rows to their cluster's mean; with metric cos
    the sum of 1 - cosine to it. passes: over the rows, in the full space."""

    labels: np.ndarray
    inertia: float
    passes: int


def balanced_clusters(
    rows: np.ndarray,
    clusters: int,
    metric: str = "l2",
    seed: int | Sequence[int] = 0,
    starts: int = STARTS,
    init_labels: np.ndarray | None = None,
) -> Clusters:
    """Rows, brought to length 1, in ``clusters`` groups of the same size.

    The result depends on the rows and ``seed`` alone: rows in another order are grouped alike. A row of zeros stays
    one. The matrix is held twice: as given, and in an order of its own.

    Args:
        rows: float32 (n, width).
        metric: "l2": squared distance to the mean; "cos": 1 - cosine to it.
        starts: random beginnings; the best end is taken, and exchanges of pairs make it better. One is the quick way:
            without them, they take as long as it.
        init_labels: int (n,), groups to begin with instead.

    Raises:
        UserError: n is no multiple of ``clusters``, an unknown metric, values that are no numbers, wrong labels.
    """
    _check(rows, clusters, metric, init_labels)
    if clusters == 1:
        return Clusters(np.zeros(len(rows), np.int64), _only(rows, metric), 0)
    order = own_order(rows)
    x = unit_rows(rows, order)
    space = _Space(x, clusters, Objective(metric, len(x) // clusters))
    if init_labels is not None:
        first = [np.asarray(init_labels, np.int64)[order]]
    else:
        first = _starts(space, np.random.default_rng(seed), starts)
    found = [space.settle(labels, FINE) for labels in first]
    best = max(found, key=lambda state: state.value)
    if init_labels is not None or starts > 1:
        space.polish(best)
    labels = np.empty(len(x), np.int64)
    labels[order] = best.labels
    return Clusters(labels, space.objective.inertia(x, best.sums), sum(state.passes for state in found))


def unit_rows(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """float32 rows in ``order``, each of length 1; rows of zeros stay so."""
    x = rows[order].astype(np.float32, copy=False)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        part /= np.maximum(np.abs(part).max(1, keepdims=True, initial=0), np.float32(1e-30))  # or squares vanish
        norms = np.sqrt(np.einsum("ij,ij->i", part, part))
        part /= np.where(norms > 0, norms, 1)[:, None]
    return x


def own_order(rows: np.ndarray) -> np.ndarray:
    """An order that depends on what the rows hold, not on where they stand."""
    sums = np.array([zlib.crc32(np.ascontiguousarray(row).data) for row in rows], np.uint32)
    return np.lexsort((rows[:, -1], rows[:, 0], sums))


@dataclass
class State:
    """Where a search stands. sums: float64 (clusters, width). value: the objective."""

    labels: np.ndarray
    sums: np.ndarray
    value: float
    prices: np.ndarray | None
    passes: int


class _Space:
    """Rows, in full or projected, and the search over them."""

    def __init__(self, x: np.ndarray, clusters: int, objective: Objective) -> None:
        self.x, self.clusters, self.objective = x, clusters, objective
        self.sizes = np.full(clusters, len(x) // clusters)

    def settle(self, labels: np.ndarray, tolerance: float, prices: np.ndarray | None = None) -> State:
        """Passes from ``labels`` until nothing moves."""
        state = State(labels, self._sums(labels), 0.0, prices, 0)
        state.value = self.objective.value(state.sums)
        for _ in range(PASSES):
            before = state.value
            if not self.step(state, state.sums) or state.value - before <= tolerance * abs(before):
                break
        return state

    def step(self, state: State, sums: np.ndarray) -> bool:
        """One pass: the best assignment to the centres of ``sums``; whether rows have moved."""
        centres = self.objective.centres(sums).astype(np.float32)
        labels, state.prices = assign(centres @ self.x.T, self.sizes, state.prices)
        state.passes += 1
        moved = np.flatnonzero(labels != state.labels)
        if not moved.size:
            return False
        new = state.sums + self._change(moved, state.labels[moved], labels[moved])
        value = self.objective.value(new)
        if value <= state.value:
            return False
        state.labels, state.sums, state.value = labels, new, value
        return True

    def begin(self, centres: np.ndarray) -> State:
        """The best assignment to ``centres``, float32 (clusters, width)."""
        labels, prices = assign(centres @ self.x.T, self.sizes)
        return State(labels, self._sums(labels), 0.0, prices, 1)

    def polish(self, state: State) -> None:
        """Exchanges of pairs and passes behind them, until neither raises the sum."""
        for _ in range(ROUNDS):
            before = state.value
            state.labels = exchange(self.x, state.labels, state.sums, self.objective)
            state.sums = self._sums(state.labels)
            state.value = self.objective.value(state.sums)
            while self.step(state, state.sums):
                pass
            if state.value - before <= POLISHED * abs(before):
                break

    def _sums(self, labels: np.ndarray) -> np.ndarray:
        member = (labels == np.arange(self.clusters)[:, None]).astype(np.float32)
        return (member @ self.x).astype(np.float64)

    def _change(self, moved: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """What the sums gain by the rows ``moved``; in blocks, so that no copy of the matrix is made."""
        names = np.arange(self.clusters)[:, None]
        total = np.zeros((self.clusters, self.x.shape[1]))
        for start in range(0, len(moved), BLOCK):
            part = slice(start, start + BLOCK)
            signs = (new[part] == names).astype(np.float32) - (old[part] == names)
            total += signs @ self.x[moved[part]]
        return total


def _starts(space: _Space, rng: np.random.Generator, starts: int) -> list[np.ndarray]:
    """The labels of the best restarts, found in a projection."""
    small = _Space(_projected(space.x, rng), space.clusters, space.objective)
    norms = np.einsum("ij,ij->i", small.x, small.x)
    ends = []
    for _ in range(starts):
        state = small.begin(small.x[spread_rows(small.x, norms, space.clusters, rng)])
        ends.append(small.settle(state.labels, ROUGH, state.prices))
    ends.sort(key=lambda state: -state.value)
    chosen: list[State] = []
    for state in ends:  # one end may be reached twice
        if all(abs(state.value - other.value) > ROUGH * abs(other.value) for other in chosen):
            chosen.append(state)
    return [state.labels for state in chosen[:REFINED]]


def _projected(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows in the leading directions, roughly: one step of subspace iteration (Halko et al. 2011)."""
    width = x.shape[1]
    directions = PROJECTION + width // WIDER
    if width <= directions:
        return x
    noise = rng.standard_normal((width, directions), dtype=np.float32)
    basis, _ = np.linalg.qr(x.T @ (x @ noise))
    return x @ basis


def spread_rows(x: np.ndarray, norms: np.ndarray, clusters: int, rng: np.random.Generator) -> list[int]:
    """Rows far from each other, by k-means++ with 2 + ln(clusters) trials each (Arthur and Vassilvitskii 2007)."""
    trials = 2 + int(np.log(clusters))
    chosen = [int(rng.integers(len(x)))]
    near = np.maximum(norms + norms[chosen[0]] - 2 * (x @ x[chosen[0]]), 0)
    while len(chosen) < clusters:
        total = np.cumsum(near, dtype=np.float64)
        tried = np.minimum(np.searchsorted(total, rng.random(trials) * total[-1]), len(x) - 1)
        far = np.maximum(norms + norms[tried, None] - 2 * (x[tried] @ x.T), 0)
        np.minimum(far, near, out=far)
        best = int(far.sum(1).argmin())
        chosen.append(int(tried[best]))
        near = far[best]
    return chosen


def _only(rows: np.ndarray, metric: str) -> float:
    x = unit_rows(rows, np.arange(len(rows)))
    return Objective(metric, len(x)).inertia(x, x.sum(0, dtype=np.float64)[None])


def check_finite(rows: np.ndarray) -> None:
    """A row with a value that is no number is a ``UserError``."""
    for start in range(0, len(rows), BLOCK):
        good = np.isfinite(rows[start : start + BLOCK]).all(1)
        if not good.all():
            raise UserError(
                f"row {start + int(good.argmin())} holds NaN or infinity: the weights are damaged, copy the model again"
            )


def _check(rows: np.ndarray, clusters: int, metric: str, init_labels: np.ndarray | None) -> None:
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"rows of a matrix are clustered, found an array of shape {rows.shape}")
    if metric not in METRICS:
        raise UserError(f"metric '{metric}' is unknown: choose one of {', '.join(METRICS)}")
    expert_size(len(rows), clusters)
    check_finite(rows)
    if init_labels is not None:
        counts = np.bincount(np.asarray(init_labels), minlength=clusters) if len(init_labels) == len(rows) else ()
        if len(counts) != clusters or len(set(counts)) != 1:
            raise UserError(f"labels to begin with are {len(rows)} numbers from 0 to {clusters - 1}, each as often")
