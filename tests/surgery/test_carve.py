# SPDX-License-Identifier: Apache-2.0
"""Carving one layer: groups, routers and refits against direct computation in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery import ridge
from mindformers_ext.surgery.experts.carve.carved import file_rows, weight_error
from mindformers_ext.surgery.experts.carve.choose import Linear, Threshold, output_lengths
from mindformers_ext.surgery.experts.carve.grouping import InputFit, by_prediction
from mindformers_ext.surgery.experts.carve.markers import Markers
from mindformers_ext.surgery.experts.carve.recipes import (
    LEAST_SQUARES,
    METHODS,
    NONE,
    ROUTERS,
    STATIC,
    Recipe,
    carve_layer,
)
from mindformers_ext.surgery.experts.carve.refit import refit_sums
from mindformers_ext.surgery.experts.carve.sample import LayerSample
from mindformers_ext.surgery.experts.scores import output_norms
from mindformers_ext.surgery.prune.least_squares import RIDGE, add_moments, fitted

TOKENS, HIDDEN, WIDTH = 700, 12, 48
RECIPE = Recipe(method="emp", experts=8, shared=2, active=2)


def sample_of(seed: int = 0, tokens: int = TOKENS, hidden: int = HIDDEN, width: int = WIDTH) -> LayerSample:
    """Random matrices and inputs; a token in a hundred is a thousand times as large."""
    rng = np.random.default_rng(seed)
    gate, up = rng.normal(size=(2, width, hidden))
    down = rng.normal(size=(hidden, width)).astype(np.float32)
    x = rng.normal(size=(tokens, hidden)) @ rng.normal(size=(hidden, hidden))
    x[::100] *= 1000
    gates = x @ gate.T
    answers = gates / (1 + np.exp(-np.clip(gates, -500, 500))) * (x @ up.T)
    weights = 1 / np.square(x + answers @ down.T).sum(1)
    x, answers, gate, up = (array.astype(np.float32) for array in (x, answers, gate, up))
    return LayerSample(x, answers, weights, np.arange(tokens) // 64, gate, up, down)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_damped_solutions_are_numpys(size: int) -> None:
    rng = np.random.default_rng(size)
    x, wanted = rng.normal(size=(size + 5, size)), rng.normal(size=(size, 3))
    squares = x.T @ x
    direct = np.linalg.solve(squares + 0.1 * np.trace(squares) / size * np.eye(size), wanted)
    squares[np.triu_indices(size, 1)] = np.nan  # the other triangle is not read
    lower, added = ridge.factor(squares, 0.1)
    half = ridge.forward(lower, wanted.copy())
    assert np.square(half).sum() == pytest.approx((direct * wanted).sum(), rel=1e-10)
    np.testing.assert_allclose(ridge.backward(lower, half), direct, rtol=1e-9, atol=1e-12)
    assert added > 0
    zeros = ridge.solve(ridge.factor(np.zeros((3, 3)), 0.1)[0], np.zeros((3, 2)))
    assert not zeros.any()


def test_sums_are_those_of_float64() -> None:
    sample = sample_of()
    direct = sample.weights[:, None] * np.square(sample.hidden, dtype=np.float64)
    direct *= np.square(sample.down, dtype=np.float64).sum(0)
    np.testing.assert_allclose(sample.energies(), direct.sum(0), rtol=1e-5)
    labels = np.arange(WIDTH) % 4 - 1
    found = sample.group_energies(labels, 3)
    for group in range(3):
        np.testing.assert_allclose(found[:, group], direct[:, labels == group].sum(1), rtol=1e-4)
    mean, variance = sample.moments()
    np.testing.assert_allclose(mean, sample.hidden.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(variance, sample.hidden.var(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("size", [5, 16])
def test_output_lengths_are_those_of_the_outputs(size: int) -> None:
    sample = sample_of()
    experts = [np.arange(start, start + size) for start in range(0, WIDTH - size, size)]
    direct = output_norms(
        torch.from_numpy(sample.hidden), torch.from_numpy(sample.down), tuple(map(torch.from_numpy, experts))
    )
    found = output_lengths(sample.hidden, sample.down, experts)
    np.testing.assert_allclose(found, direct.numpy(), rtol=2e-3, atol=1e-3)


def test_markers_are_the_largest_answers_and_distances_those_of_columns() -> None:
    sample = sample_of(tokens=90)
    markers = Markers(sample)
    ranks = np.argsort(np.argsort(-np.abs(sample.hidden), axis=1), axis=1)
    np.testing.assert_array_equal(markers.marks, ranks < WIDTH // 10)
    centres = np.random.default_rng(1).random((90, 3))
    direct = np.abs(markers.marks[:, None, :] - centres[:, :, None]).sum(0)
    np.testing.assert_allclose(markers.distances(centres), direct, rtol=1e-5)


def planted(groups: int, size: int, shared: int) -> tuple[LayerSample, np.ndarray]:
    """A layer whose neurons answer in blocks, one block to each token by what x says; the first ``shared`` always."""
    rng = np.random.default_rng(5)
    tokens, width = 600, shared + groups * size
    topics = rng.integers(0, groups, tokens)
    x = np.eye(groups, 16)[topics] + 0.05 * rng.normal(size=(tokens, 16))
    labels = np.concatenate((np.full(shared, -1), rng.permutation(np.repeat(np.arange(groups), size))))
    answers = rng.normal(size=(tokens, width)) * np.where(labels == topics[:, None], 1.0, 0.02)
    answers[:, :shared] = 3 * rng.normal(size=(tokens, shared))
    down = rng.normal(size=(16, width))
    x, answers, down = (array.astype(np.float32) for array in (x, answers, down))
    return LayerSample(
        x, answers, np.ones(tokens), np.zeros(tokens, int), *rng.normal(size=(2, width, 16)), down
    ), labels


def test_planted_blocks_are_found_and_the_router_finds_them() -> None:
    sample, labels = planted(groups=4, size=8, shared=8)
    carved = carve_layer(sample, Recipe(method="emp", experts=5, shared=1, active=1, refit=NONE), 0)
    np.testing.assert_array_equal(carved.always, np.flatnonzero(labels < 0))
    assert {frozenset(ids) for ids in carved.split.experts} == {
        frozenset(np.flatnonzero(labels == group)) for group in range(4)
    }
    whole = sample.hidden @ sample.down.T
    lost = np.square(whole - carved.output(sample.x, sample.hidden)).sum() / np.square(whole).sum()
    assert lost < 0.002  # what the blocks that are not a token's own answer
    rest = np.flatnonzero(labels >= 0)
    wrong = np.arange(len(rest)) % 4  # from a start that knows nothing of them
    found = by_prediction(sample, InputFit.of(sample.x), rest, wrong, 1)
    assert any((np.array(order)[found] == labels[rest]).mean() == 1 for order in permutations(range(4)))


@pytest.mark.parametrize("method", [*METHODS])
def test_all_experts_chosen_are_the_dense_layer(method: str) -> None:
    sample = sample_of()
    carved = carve_layer(sample, replace(RECIPE, method=method, active=6), 0)
    dense = sample.hidden @ sample.down.T
    np.testing.assert_allclose(carved.output(sample.x, sample.hidden), dense, rtol=1e-4, atol=1e-4)
    assert carved.split.is_partition and {*carved.split.sizes} == {6} and carved.split.residual_sizes == (12,)
    np.testing.assert_array_equal(carved.down, sample.down)  # nothing is missing: nothing is fitted anew


@pytest.mark.parametrize("seed", range(6))
def test_the_refit_is_the_direct_solution_and_never_raises_the_error(seed: int) -> None:
    sample = sample_of(seed)
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(WIDTH), 6)
    always, experts = (parts[0], parts[1:]) if seed % 2 else (np.zeros(0, int), parts)
    chosen = rng.random((TOKENS, len(experts))) < rng.random(len(experts))
    chosen[:, 0] = False  # never chosen: its columns stay
    found = refit_sums(sample, always, experts, chosen).solve(sample.down)
    seen = np.zeros((TOKENS, WIDTH))
    seen[:, always] = 1
    for place, ids in enumerate(experts):
        seen[:, ids] = chosen[:, [place]]
    answers, down = sample.hidden.astype(np.float64), sample.down.astype(np.float64)
    masked, scale = answers * seen, np.sqrt(sample.weights)[:, None]
    used = np.flatnonzero(seen.any(0))
    mine = (masked * scale)[:, used]
    damping = RIDGE * np.square(mine).sum() / len(used)
    change = np.linalg.lstsq(
        np.vstack((mine, np.sqrt(damping) * np.eye(len(used)))),
        np.vstack((scale * ((answers - masked) @ down.T), np.zeros((len(used), HIDDEN)))),
        rcond=None,
    )[0]
    direct = down.copy()
    direct[:, used] += change.T
    np.testing.assert_allclose(found.down, direct, atol=1e-4 * np.abs(direct).max())
    errors = [np.square(scale * (answers @ down.T - masked @ matrix.T)).sum() / TOKENS for matrix in (down, direct)]
    assert (found.before, found.after) == pytest.approx(errors, rel=1e-4)
    assert found.after <= found.before
    np.testing.assert_array_equal(found.down[:, experts[0]], sample.down[:, experts[0]])


def test_the_refit_of_a_static_cut_is_that_of_pruning() -> None:
    sample = sample_of()
    carved = carve_layer(sample, replace(RECIPE, method="rel"), 0)
    kept, scale = carved.always, 1 / np.sqrt(sample.weights)
    moments = np.zeros((WIDTH, WIDTH))
    add_moments(moments, sample.hidden, np.stack((scale, np.zeros(TOKENS)), 1))
    wanted = fitted(moments, sample.down, kept)
    np.testing.assert_allclose(carved.down[:, kept], wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("method", STATIC)
def test_static_cuts_keep_what_they_say(method: str) -> None:
    sample = sample_of()
    answers, columns = sample.hidden.astype(np.float64), np.linalg.norm(sample.down.astype(np.float64), axis=0)
    scores = {
        "activation": np.abs(answers).sum(0) * columns,
        "wifv": answers.var(0) * columns**2,
        "rel": (sample.weights @ np.square(answers)) * columns**2,
    }[method]
    recipe = replace(RECIPE, method=method, refit=NONE, bias=True)
    carved = carve_layer(sample, recipe, 0)
    kept = np.sort(np.argsort(-scores)[: WIDTH // 2])
    np.testing.assert_array_equal(carved.always, kept)
    gone = np.setdiff1d(np.arange(WIDTH), kept)
    direct = answers[:, kept] @ sample.down[:, kept].T + answers[:, gone].mean(0) @ sample.down[:, gone].T
    np.testing.assert_allclose(carved.output(sample.x, sample.hidden), direct, rtol=1e-3, atol=1e-3)


def test_rows_of_a_file_choose_alike_and_weigh_within_what_is_said() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, HIDDEN)).astype(np.float32)
    rows = rng.normal(size=(6, HIDDEN)) + 20 * rng.normal(size=HIDDEN)  # all experts have most of it in common
    mine = file_rows(rows, x)
    error = weight_error(x, mine, 2)
    logits = x.astype(np.float64) @ mine.T.astype(np.float64)
    order = np.argsort(-logits, axis=1)[:, :2]
    assert (order == np.argsort(-(x.astype(np.float64) @ rows.T), axis=1)[:, :2]).all(1).mean() > 0.999
    chosen = np.take_along_axis(logits, order, 1)
    weights = 2 * np.exp(chosen) / np.exp(chosen).sum(1, keepdims=True)
    assert error.largest == pytest.approx(np.abs(weights - 1).max(), rel=1e-2)
    assert error.mean == pytest.approx(np.abs(weights - 1).mean(), rel=1e-2)
    assert 0.001 < error.largest < 0.03 and error.same > 0.999
    assert weight_error(x, mine, 1).largest == 0
    assert np.isfinite(file_rows(np.zeros((3, HIDDEN)), x)).all()


def test_a_threshold_keeps_the_mean_count_and_knows_how_much_experts_add() -> None:
    rng = np.random.default_rng(0)
    x, rows = rng.normal(size=(500, HIDDEN)).astype(np.float32), rng.normal(size=(6, HIDDEN))
    x[:250] *= 4  # tokens to which all experts matter more take the places of others
    found = Threshold.fitted(x, rows, 2).choose(x, x)
    assert found.sum() == 1000 and found[:250].sum() > found[250:].sum() > 0
    scores = x @ rows.T.astype(np.float32)
    assert scores[found].min() > scores[~found].max()
    assert Threshold.fitted(x, rows, 6).choose(x, x).all()
    carved = carve_layer(sample_of(), replace(RECIPE, router="threshold"), 0)
    assert carved.chooser is not None and len(carved.split.experts) == RECIPE.experts - RECIPE.shared
    counts = carved.chooser.choose(sample_of().x, sample_of().hidden).sum(1)
    assert counts.mean() == pytest.approx(RECIPE.active, abs=0.01) and counts.std() > 0


@pytest.mark.parametrize("method", [*METHODS])
def test_a_layer_is_carved_alike_every_time(method: str) -> None:
    first, second = (carve_layer(sample_of(), replace(RECIPE, method=method), 3) for _ in range(2))
    assert isinstance(first.chooser, Linear) and isinstance(second.chooser, Linear)
    np.testing.assert_array_equal(first.chooser.rows, second.chooser.rows)
    np.testing.assert_array_equal(first.down, second.down)


def test_better_routers_lose_less_where_groups_are_planted() -> None:
    sample, _ = planted(groups=4, size=8, shared=8)
    whole = sample.hidden @ sample.down.T
    lost = {}
    for router in ROUTERS:
        recipe = Recipe(method="emp", experts=5, shared=1, active=1, router=router, refit=NONE)
        carved = carve_layer(sample, recipe, 0)
        lost[router] = float(np.square(whole - carved.output(sample.x, sample.hidden)).sum())
    assert lost["oracle"] <= lost["ridge"] < min(lost["mean_gate"], lost["representative"])
    recipe = Recipe(method="rel", experts=5, shared=1, active=1, refit=LEAST_SQUARES)
    static = carve_layer(sample, recipe, 0)
    assert lost["ridge"] < float(np.square(whole - static.output(sample.x, sample.hidden)).sum())


@pytest.mark.parametrize("name", ["x", "hidden", "weights", "down"])
def test_values_that_are_not_finite_are_said(name: str) -> None:
    sample = sample_of()
    broken = getattr(sample, name).copy()
    broken.flat[5] = np.nan
    with pytest.raises(UserError, match="layer 4"):
        carve_layer(replace(sample, **{name: broken}), RECIPE, 4)
