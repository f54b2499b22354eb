# SPDX-License-Identifier: Apache-2.0
"""Neurons into experts: exact assignment against scipy, balanced clusters, splits by importance and by graph."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts import graph
from mindformers_ext.surgery.experts.assign import assign
from mindformers_ext.surgery.experts.cluster import balanced_clusters
from mindformers_ext.surgery.experts.gradient import independent_split, overlap, residual_split, sharing_split
from mindformers_ext.surgery.experts.random import random_split
from mindformers_ext.surgery.experts.split import LayerSplit


def matrix(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def inertia(x: np.ndarray, labels: np.ndarray) -> float:
    x = x.astype(np.float64) / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-30)
    return sum(((part - part.mean(0)) ** 2).sum() for part in (x[labels == label] for label in np.unique(labels)))


def cosines(x: np.ndarray, labels: np.ndarray) -> float:
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return len(x) - sum(np.linalg.norm(x[labels == label].sum(0)) for label in np.unique(labels))


def groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


SPOILED = {
    "plain": lambda s: s,
    "whole numbers": np.round,
    "equal rows": lambda s: np.where(np.arange(s.shape[1]) < 300, 0, s),
    "five kinds of rows": lambda s: s[:, np.arange(s.shape[1]) % 5],
    "all zero": lambda s: s * 0,
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("case", range(4))
def test_an_assignment_has_the_sum_of_scipys(kind: str, case: int) -> None:
    rng = np.random.default_rng(case)
    scores = np.ascontiguousarray(SPOILED[kind](rng.standard_normal((8, 512))), np.float32 if case % 2 else np.float64)
    sizes = np.full(8, 64) if case < 2 else np.bincount(rng.integers(0, 8, 504), minlength=8) + 1
    labels, _ = assign(scores, sizes, rng.standard_normal(8) if case == 3 else None)
    assert np.bincount(labels, minlength=8).tolist() == sizes.tolist()
    places = np.repeat(scores.astype(np.float64), sizes, axis=0)
    best = places[linear_sum_assignment(-places)].sum()
    assert scores[labels, np.arange(512)].sum(dtype=np.float64) == pytest.approx(best, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_clusters_have_one_size_and_their_inertia_is_the_rows(experts: int, metric: str) -> None:
    x = matrix(192, 40) if experts != 16 else matrix(192, 40)[:, :1] * np.ones(40, np.float32)  # two directions
    found = balanced_clusters(x, experts, metric, starts=2)
    assert set(np.bincount(found.labels, minlength=experts)) == {192 // experts}
    judge = inertia if metric == "l2" else cosines
    assert found.inertia == pytest.approx(judge(x, found.labels), rel=1e-4, abs=1e-4)


def test_clusters_follow_the_rows_into_another_order_and_a_seed_gives_the_same() -> None:
    x = matrix(256, 24)
    x[7] = x[3] = 0
    found = balanced_clusters(x, 8, seed=4)
    assert np.array_equal(found.labels, balanced_clusters(x, 8, seed=4).labels)
    order = np.random.default_rng(1).permutation(256)
    other = balanced_clusters(x[order], 8, seed=4)
    assert other.inertia == pytest.approx(found.inertia, rel=1e-9)
    back = np.empty(256, np.int64)
    back[order] = other.labels
    alike = np.arange(256) != 3  # rows of zeros are the same row: either may stand for the other
    assert np.sum(back[:, None] != back) == np.sum(found.labels[:, None] != found.labels)
    pairs = (back[:, None] == back) != (found.labels[:, None] == found.labels)
    assert not pairs[np.ix_(alike & (np.arange(256) != 7), alike & (np.arange(256) != 7))].any()


def test_planted_clusters_are_found_whole() -> None:
    centres = np.linalg.qr(matrix(64, 64))[0][:8]
    truth = np.random.default_rng(2).permutation(np.repeat(np.arange(8), 48))
    x = (centres[truth] + 0.03 * matrix(384, 64, 3)) * np.random.default_rng(0).lognormal(0, 0.5, (384, 1))
    for metric in ("l2", "cos"):
        assert groups(balanced_clusters(x.astype(np.float32), 8, metric).labels) == groups(truth)


# k-means-constrained 0.9.1 (numpy 2.4.6) on matrix(512, 64) with rows of length 1, judged by ``inertia``:
# KMeansConstrained(8, size_min=64, size_max=64, max_iter=500, random_state=0, n_jobs=1), ten starts, its default
PEERS = 473.4554


def test_the_inertia_is_no_larger_than_the_peers() -> None:
    x = matrix(512, 64)
    assert inertia(x, balanced_clusters(x, 8, starts=10).labels) <= PEERS


@pytest.mark.parametrize(("metric", "judge"), [("l2", inertia), ("cos", cosines)])
def test_no_exchange_of_two_rows_makes_the_end_better(metric: str, judge) -> None:
    x = matrix(30, 6)
    labels = balanced_clusters(x, 3, metric, starts=2).labels
    value = judge(x, labels)
    for i in range(30):
        for j in range(i):
            other = labels.copy()
            other[[i, j]] = labels[[j, i]]
            assert judge(x, other) > value - 2e-5 * abs(value)


def test_labels_to_begin_with_are_the_beginning() -> None:
    x = matrix(128, 16)
    found = balanced_clusters(x, 4, starts=4)
    assert np.array_equal(balanced_clusters(x, 4, init_labels=found.labels).labels, found.labels)
    lot = random_split(128, 4, 0).labels()
    assert balanced_clusters(x, 4, init_labels=lot).inertia < inertia(x, lot)
    with pytest.raises(UserError, match="each as often"):
        balanced_clusters(x, 4, init_labels=np.zeros(128, int))


@pytest.mark.parametrize(
    ("rows", "experts", "message"),
    [
        (matrix(10, 4), 3, "choose a divisor of 10"),
        (matrix(4, 4), 8, "choose a divisor of 4"),
        (matrix(4, 4), 0, "choose a divisor of 4"),
        (np.where(np.arange(8)[:, None] == 5, np.nan, matrix(8, 4)), 2, "row 5 holds NaN"),
        (np.where(np.arange(8)[:, None] == 6, np.inf, matrix(8, 4)), 2, "row 6 holds NaN or inf"),
    ],
)
def test_rows_that_cannot_be_clustered_are_refused(rows: np.ndarray, experts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        balanced_clusters(rows.astype(np.float32), experts)


def test_a_split_knows_its_labels_and_refuses_what_is_none() -> None:
    split = LayerSplit.from_labels([1, 0, 1, 0, 2, 2], 3)
    assert [ids.tolist() for ids in split.experts] == [[1, 3], [0, 2], [4, 5]] and split.sizes == (2, 2, 2)
    assert split.labels().tolist() == [1, 0, 1, 0, 2, 2] and split.is_partition
    assert split.mask().sum(1).tolist() == [1] * 6
    shared = LayerSplit(6, ([0, 1], [1, 2]), ([5],))
    with pytest.raises(UserError, match="shared, left out or in residual"):
        shared.labels()
    for labels, experts, message in (
        ([0, 2], 2, "neuron 1 has expert 2"),
        ([0, -1], 2, "expert -1"),
        ([0, 0], 2, "expert 1 is empty"),
        ([0.5, 1], 2, "whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            LayerSplit.from_labels(labels, experts)
    with pytest.raises(UserError, match="twice"):
        LayerSplit(4, ([1, 1],))
    with pytest.raises(UserError, match="the layer has 4"):
        LayerSplit(4, ([1, 4],))


def slow_greedy(scores: np.ndarray, size: int, free: set[int]) -> list[list[int]]:
    """As the rule is written: the best pair again and again; equal scores to the later expert."""
    held: list[list[int]] = [[] for _ in scores]
    while any(len(ids) < size for ids in held):
        pairs = [(scores[e, i], e, -i) for e in range(len(scores)) if len(held[e]) < size for i in free]
        _, expert, neuron = max(pairs)
        held[expert].append(-neuron)
        free.discard(-neuron)
    return [sorted(ids) for ids in held]


def slow_residual(scores: np.ndarray, size: int, residual: int) -> list[int]:
    order = [sorted(range(scores.shape[1]), key=lambda i: (-row[i], i)) for row in scores]
    chosen: list[int] = []
    while len(chosen) < residual * size:
        tops = [[i for i in ids if i not in chosen][:size] for ids in order]
        count = {i: sum(i in top for top in tops) for i in range(scores.shape[1])}
        most = [i for i in count if count[i] == max(count.values())]
        chosen += most[: residual * size - len(chosen)]
    return chosen


def test_splits_by_importance_follow_their_rules() -> None:
    scores = np.round(np.random.default_rng(5).random((3, 24)), 1)  # many equal ones
    greedy = independent_split(scores, 8)
    assert [ids.tolist() for ids in greedy.experts] == slow_greedy(scores, 8, set(range(24)))
    exact = independent_split(scores, 8, exact=True)
    total = [sum(scores[e, ids].sum() for e, ids in enumerate(split.experts)) for split in (greedy, exact)]
    places = np.repeat(scores, 8, axis=0)
    assert total[1] == pytest.approx(places[linear_sum_assignment(-places)].sum()) and total[1] >= total[0]
    sharing = sharing_split(scores, 10)
    for row, ids in zip(scores, sharing.experts, strict=True):
        assert len(ids) == 10 and row[ids].min() >= np.delete(row, ids).max()
    mixed = residual_split(scores, 4, 2)
    assert np.concatenate(mixed.residual).tolist() == slow_residual(scores, 4, 2)
    assert all(len(ids) == 4 and not set(ids) & set(np.concatenate(mixed.residual)) for ids in mixed.experts)
    whole = residual_split(scores, 6, 1, share=False)
    rest = set(range(24)) - set(whole.residual[0].tolist())
    assert whole.is_partition and [ids.tolist() for ids in whole.experts] == slow_greedy(scores, 6, rest)
    count, rate = overlap(LayerSplit(6, ([0, 1, 2], [2, 3]), ([2],)))
    assert count.tolist() == [[1, 1, 1], [1, 3, 1], [1, 1, 2]] and rate[1, 2] == 1 / 4
    for call, message in (
        (lambda: independent_split(scores, 7), "use every neuron once"),
        (lambda: sharing_split(scores, 25), "--expert_size 25"),
        (lambda: residual_split(scores, 12, 1, share=False), "the layer has 24"),
        (lambda: residual_split(scores, 9, 2), "leave fewer than 9"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_graph_is_the_references_and_its_blocks_are_the_parts() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 12)
    active = rng.random((2, 60, 4)) < 0.3
    shards = [(0.4 * one[:, truth] + 0.02 * rng.random((60, 48))).astype(np.float32) for one in active]
    total = graph.coactivation(shards, 48, "l1_norm", 1.0)
    judge = sum(np.minimum(np.abs(h).T.astype(np.float64) @ np.abs(h), 1) for h in shards)
    assert np.allclose(total, judge, rtol=1e-5)
    step = 0.99 * np.percentile(judge, 10)
    expected = np.where(np.eye(48, dtype=bool), 0, (judge / step).astype(int))
    weights = graph.edge_weights(total)
    assert np.array_equal(weights, weights.T) and np.abs(weights - expected).max() <= 1
    head, *lines = graph.metis_lines(weights)
    assert head == f"48 {np.count_nonzero(weights) // 2} 001" and len(lines) == 48
    for number, line in enumerate(lines):
        pairs = np.array(line.split(), int).reshape(-1, 2)
        assert {(j - 1, w) for j, w in pairs} == {(j, w) for j, w in enumerate(weights[number]) if w}
    labels = graph.spectral_parts(weights, 4, 0)
    assert groups(labels) == groups(truth)
    uneven = labels.copy()
    uneven[labels == 0] = 1  # one part empty, one twice too large
    mended = graph.rebalance(uneven, 4, weights, 1)
    assert set(np.bincount(mended, minlength=4)) == {12} and (mended != uneven).sum() == 12
    assert np.array_equal(mended, graph.rebalance(uneven, 4, weights, 1))
    with pytest.raises(UserError, match="no two neurons"):
        graph.edge_weights(np.zeros((4, 4), np.float32))
