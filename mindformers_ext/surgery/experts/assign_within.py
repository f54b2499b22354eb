# SPDX-License-Identifier: Apache-2.0
"""Rows to columns with sizes between two bounds, the sum of scores at its maximum (``assign`` has fixed sizes).

A column within its bounds has price 0; one that too many rows want gets the price at which its places are just filled,
one that too few want is paid. What is left moves over shortest paths, as in ``assign``, in a graph with one node more:
a row may stay in any column that has room (column -> node) and leave any that has more than it must (node -> column).
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.surgery.experts.assign import cheapest, move_costs, path_to, row_losses, shortest_paths

ROUNDS = 8  # of prices, over all columns


def assign_within(scores: np.ndarray, least: int, most: int) -> np.ndarray:
    """int64 (n,): the column of each row of ``scores`` (E, n), so that their sum is largest and each column has
    ``least`` to ``most`` rows; ``ValueError`` where n rows do not fit."""
    columns, rows = scores.shape
    if not columns * least <= rows <= columns * most:
        raise ValueError(f"{rows} rows do not fit into {columns} columns of {least} to {most}")
    if columns == 1:
        return np.zeros(rows, np.int64)
    labels = _priced(scores, least, most)
    _repair(scores, labels, least, most)
    return labels


def _priced(scores: np.ndarray, least: int, most: int) -> np.ndarray:
    """What rows take at prices that are set column after column."""
    columns, rows = scores.shape
    worth = np.array(scores)  # less the prices
    labels = worth.argmax(0)
    for _ in range(ROUNDS):
        counts = np.bincount(labels, minlength=columns)
        if ((counts >= least) & (counts <= most)).all():
            break
        for column in range(columns):
            worth[column] = -np.inf
            margin = scores[column] - worth.max(0)
            wanted = int((margin > 0).sum())
            size = min(max(wanted, least), most)
            price = 0.0
            if size != wanted:
                order = np.sort(margin)
                below, above = order[max(rows - size - 1, 0)], order[min(rows - size, rows - 1)]
                price = (below + above) / 2 if 0 < size < rows else (above if size else below + 1)
            worth[column] = scores[column] - np.asarray(price, scores.dtype)
        labels = worth.argmax(0)
    return labels


def _repair(scores: np.ndarray, labels: np.ndarray, least: int, most: int) -> None:
    """Move rows until all bounds hold and no move gains; ``labels`` changes in place."""
    columns = len(scores)
    counts = np.bincount(labels, minlength=columns)
    cost = np.full((columns + 1, columns + 1), np.inf)
    cost[:columns, :columns] = move_costs(scores, labels)
    while True:
        cost[:columns, columns] = np.where(counts < most, 0.0, np.inf)
        cost[columns, :columns] = np.where(counts > least, 0.0, np.inf)
        over, under = np.append(counts > most, False), np.append(counts < least, False)
        sources = over if over.any() else np.append(np.zeros(columns, bool), True)
        distance, before, path = shortest_paths(cost, sources)
        if not path:
            ends = under.copy()
            ends[columns] = over.any()
            if not ends.any():
                return
            path = path_to(int(np.where(ends, distance, np.inf).argmin()), before)
        steps = [step for step in zip(path[:-1], path[1:], strict=True) if columns not in step]
        moves = [(cheapest(scores, labels, *step), step) for step in steps]  # all are chosen before any label changes
        for row, (here, there) in moves:
            labels[row] = there
            counts[here] -= 1
            counts[there] += 1
        for column in {column for step in steps for column in step}:
            cost[column, :columns] = row_losses(scores, labels, column)[1].min(1, initial=np.inf)
            cost[column, column] = np.inf
