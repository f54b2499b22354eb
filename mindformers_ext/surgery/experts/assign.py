# SPDX-License-Identifier: Apache-2.0
"""Rows to columns with a fixed number of rows per column, the sum of scores at its maximum: a transportation problem.

Two steps. Prices: a row takes the column whose score minus price is highest; setting a column's price so that exactly
as many rows take it as it has places is one step of coordinate descent on the dual, and a few steps leave almost every
row where it belongs. Repair: rows that are too many travel over shortest paths of the graph whose nodes are the columns
and whose edge a -> b costs what the cheapest move of a row from a to b loses: successive shortest paths keep the
optimum. A negative cycle, which only rounding of prices can leave, is taken as well.
"""

from __future__ import annotations

import numpy as np

PRICE_STEPS = 4  # per column, at most
LEFT = 3  # rows in the wrong place that are left to the repair: a path costs about as much as a step of prices
ROUNDING = 1e-12


def assign(scores: np.ndarray, sizes: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The best assignment and its prices.

    Args:
        scores: float (E, n), what column e gains from row i; finite.
        sizes: int (E,), rows per column, each at least 1, n in all.
        prices: float (E,), those of a similar problem, to begin with.

    Returns:
        labels, int64 (n,): the column of each row; sum of ``scores[labels[i], i]`` is the maximum. prices, (E,).
    """
    experts, rows = scores.shape
    if int(sizes.sum()) != rows or sizes.min() < 1:
        raise ValueError(f"sizes {sizes.tolist()} do not sum to {rows} rows, or one of them is below 1")
    if experts == 1:
        return np.zeros(rows, np.int64), np.zeros(1)
    market = _Market(scores, sizes, np.zeros(experts) if prices is None else prices)
    market.settle()
    _repair(scores, market.labels, market.counts - sizes)
    return market.labels, market.prices


class _Market:
    """Prices of columns and what rows take at them."""

    def __init__(self, scores: np.ndarray, sizes: np.ndarray, prices: np.ndarray) -> None:
        self.scores, self.sizes = scores, sizes
        self.prices = np.array(prices, scores.dtype)
        self.worth = scores - self.prices[:, None]  # (E, n)
        self.labels = self.worth.argmax(0)
        self.counts = np.bincount(self.labels, minlength=len(sizes))

    def settle(self) -> None:
        """Set prices, of the column furthest from its size first, until almost all rows are right."""
        for _ in range(PRICE_STEPS * len(self.sizes)):
            off = np.abs(self.counts - self.sizes)
            if off.sum() <= 2 * LEFT:
                return
            self.set_price(int(off.argmax()))

    def set_price(self, column: int) -> None:
        """The price at which as many rows take ``column`` as it has places."""
        labels, worth = self.labels, self.worth
        worth[column] = -np.inf
        margin = self.scores[column] - worth.max(0)
        first = len(margin) - self.sizes[column]
        order = np.argpartition(margin, (first - 1, first))
        takers = order[first:]  # by rank, not by price: rows of the same margin would come all or not at all
        self.prices[column] = (margin[order[first - 1]] + margin[order[first]]) / 2
        before = labels == column
        before[takers] = False
        leavers = np.flatnonzero(before)
        labels[leavers] = worth[:, leavers].argmax(0)
        labels[takers] = column
        np.subtract(self.scores[column], self.prices[column], out=worth[column])
        self.counts = np.bincount(labels, minlength=len(self.sizes))


def _repair(scores: np.ndarray, labels: np.ndarray, excess: np.ndarray) -> None:
    """Move rows over shortest paths until no column has an ``excess`` or lack; ``labels`` changes in place."""
    if not excess.any():
        return
    cost = move_costs(scores, labels)
    while excess.any():
        distance, before, path = shortest_paths(cost, excess > 0)
        if not path:
            end = int(np.where(excess < 0, distance, np.inf).argmin())
            path = path_to(end, before)
            excess[path[0]] -= 1
            excess[end] += 1
        moves = [(cheapest(scores, labels, *step), step[1]) for step in zip(path[:-1], path[1:], strict=True)]
        for row, there in moves:  # all are chosen before any label changes
            labels[row] = there
        if len(path) == 2:
            _move_equal(scores, labels, excess, path, cost[path[0], path[1]])
        for column in dict.fromkeys(path):
            cost[column] = row_losses(scores, labels, column)[1].min(1, initial=np.inf)
            cost[column, column] = np.inf


def move_costs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 (E, E): what the cheapest move of a row from a to b loses."""
    columns, rows = scores.shape
    order = np.argsort(labels.astype(np.uint16), kind="stable")
    loss = (scores[labels, np.arange(rows)].astype(np.float64) - scores)[:, order]
    counts = np.bincount(labels, minlength=columns)
    held = np.flatnonzero(counts)  # reduceat knows no empty segments
    cost = np.full((columns, columns), np.inf)
    cost[held] = np.minimum.reduceat(loss, (np.cumsum(counts) - counts)[held], axis=1).T
    np.fill_diagonal(cost, np.inf)
    return cost


def row_losses(scores: np.ndarray, labels: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of ``column``, and what each loses in every other one, float64 (E, rows)."""
    members = np.flatnonzero(labels == column)
    part = scores[:, members]
    return members, part[column].astype(np.float64) - part


def cheapest(scores: np.ndarray, labels: np.ndarray, here: int, there: int) -> int:
    """The row that loses least on its way."""
    members = np.flatnonzero(labels == here)
    loss = scores[here, members].astype(np.float64) - scores[there, members]
    return int(members[loss.argmin()])


def _move_equal(scores: np.ndarray, labels: np.ndarray, excess: np.ndarray, path: list[int], cost: float) -> None:
    """More rows that lose the same on the way from the first to the second column, as far as both want them."""
    here, there = path
    wanted = min(excess[here], -excess[there])
    if wanted <= 0:
        return
    members = np.flatnonzero(labels == here)
    loss = scores[here, members].astype(np.float64) - scores[there, members]
    equal = members[loss == cost][:wanted]
    labels[equal] = there
    excess[here] -= len(equal)
    excess[there] += len(equal)


def shortest_paths(cost: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Bellman and Ford: distance of each node from the nearest source, the node before it, and a negative cycle if
    there is one (first node = last)."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(cost), -1)
    for _ in range(len(cost)):
        through = distance[:, None] + cost
        best = through.argmin(0)
        shorter = through[best, np.arange(len(cost))]
        better = shorter < distance - ROUNDING
        if not better.any():
            return distance, before, []
        distance = np.where(better, shorter, distance)
        before = np.where(better, best, before)
    node = int(np.flatnonzero(better)[0])
    for _ in range(len(cost)):
        node = int(before[node])
        if node < 0:
            return distance, before, []
    path = [node]
    while path[0] != path[-1] or len(path) == 1:
        path.append(int(before[path[-1]]))
    return distance, before, path[::-1]


def path_to(node: int, before: np.ndarray) -> list[int]:
    """From a source to ``node``."""
    path = [node]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
