# SPDX-License-Identifier: Apache-2.0
"""Clusters of bounded sizes: bounds hold, the assignment is the best one (SciPy judges), what is apart is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts import bounded
from mindformers_ext.surgery.experts.assign_within import assign_within
from mindformers_ext.surgery.experts.bounded import bounded_clusters, size_bounds


def blobs(sizes: list[int], width: int = 6, apart: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(2)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = draws.normal(size=(len(labels), width)) + apart * draws.normal(size=(len(sizes), width))[labels]
    order = draws.permutation(len(labels))
    return rows[order].astype(np.float32), labels[order]


@pytest.mark.parametrize(("rows", "jitter", "wanted"), [(400, 0.4, (34, 80)), (400, 0.0, (57, 58)), (7, -1, (1, 1))])
def test_bounds(rows: int, jitter: float, wanted: tuple[int, int]) -> None:
    assert size_bounds(rows, 7, jitter) == wanted


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_assignment_is_the_best_within_its_bounds(data: st.DataObject) -> None:
    """Beside a search through all assignments."""
    columns, rows = data.draw(st.integers(2, 3)), data.draw(st.integers(3, 6))
    least, most = size_bounds(rows, columns, data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])))
    values = data.draw(st.lists(st.integers(-5, 5), min_size=columns * rows, max_size=columns * rows))
    scores = np.array(values, np.float32).reshape(columns, rows)
    labels = assign_within(scores, least, most)
    counts = np.bincount(labels, minlength=columns)
    assert least <= counts.min() and counts.max() <= most
    every = np.indices((columns,) * rows).reshape(rows, -1)
    held = np.stack([(every == column).sum(0) for column in range(columns)])
    allowed = every[:, (held >= least).all(0) & (held <= most).all(0)]
    best = scores[allowed, np.arange(rows)[:, None]].sum(0).max()
    assert scores[labels, np.arange(rows)].sum() == best


@pytest.mark.parametrize("metric", ["l2", "cos"])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_blobs_are_recovered_and_sizes_kept(jitter: float, metric: str) -> None:
    rows, labels = blobs([20, 20, 20, 20] if not jitter else [14, 18, 22, 26])
    found = bounded_clusters(rows, 4, jitter, metric, seed=3, starts=4)
    pairs = {(int(a), int(b)) for a, b in zip(found.labels, labels, strict=True)}
    assert len(pairs) == 4  # each found cluster is one blob
    least, most = size_bounds(80, 4, jitter)
    assert least <= np.bincount(found.labels).min() and np.bincount(found.labels).max() <= most
    np.testing.assert_allclose(found.centres, [rows[found.labels == e].mean(0) for e in range(4)], rtol=1e-5, atol=1e-5)
    again = bounded_clusters(rows, 4, jitter, metric, seed=3, starts=4)
    np.testing.assert_array_equal(again.centres, found.centres)


def test_uneven_blobs_are_cut_where_bounds_forbid_them() -> None:
    rows, _ = blobs([70, 10])
    for jitter in (0.0, 0.4):
        least, most = size_bounds(80, 2, jitter)
        counts = np.bincount(bounded_clusters(rows, 2, jitter, starts=2).labels)
        assert sorted(counts.tolist()) == [80 - most, most] and counts.min() >= least


def test_cosine_does_not_see_lengths() -> None:
    rows, _ = blobs([20, 20, 20])
    centres = rows[:3].astype(np.float64)
    long = rows * np.random.default_rng(0).uniform(0.1, 9, (60, 1)).astype(np.float32)
    first, second = (assign_within(bounded._scores(x, centres, "cos").round(5), 18, 22) for x in (rows, long))
    np.testing.assert_array_equal(first, second)


def test_many_rows_begin_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TRIED", 40)
    rows, labels = blobs([100, 100, 100])
    found = bounded_clusters(rows, 3, 0.1, starts=2)
    assert len({*zip(found.labels.tolist(), labels.tolist(), strict=True)}) == 3


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="3 tokens for 4 clusters"):
        bounded_clusters(np.zeros((3, 2), np.float32), 4)
