# SPDX-License-Identifier: Apache-2.0
"""Scores of experts and the gates that are fitted to them: by hand, in closed form, and on planted data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindformers_ext.surgery.experts.gate_fit import (
    GateData,
    GateTraining,
    RidgeSums,
    balance_loss,
    first_weights,
    judge_gate,
    logits,
    ridge_targets,
    target_loss,
    train_gate,
)
from mindformers_ext.surgery.experts.gate_layer import GateWish, LayerTokens, fit_gate, norms_of, scores_of
from mindformers_ext.surgery.experts.scores import CRITERIA, best, expert_scores, output_norms, quality
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.text_clusters import kmeans, tfidf
from mindformers_ext.surgery.experts.words import KINDS, SCORED

WIDTH, NEURONS, EXPERTS = 12, 32, 4


def test_the_four_criteria_by_hand() -> None:
    answers = torch.tensor([[1.0, -2.0, 3.0, -4.0], [-1.0, 0.5, 0.0, 2.0]])
    before = answers.clone()
    mask = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    wanted = {
        "plain": [[1.0, 1.0], [0.5, 2.0]],
        "positive": [[1.0, 3.0], [0.5, 2.0]],
        "l1_norm": [[3.0, 7.0], [1.5, 2.0]],
        "l2_norm": [[5.0, 25.0], [1.25, 4.0]],
    }
    assert tuple(wanted) == tuple(CRITERIA) == SCORED
    for name, scores in wanted.items():
        torch.testing.assert_close(expert_scores(answers, mask, name), torch.tensor(scores))
        torch.testing.assert_close(expert_scores(answers.half(), mask, name), torch.tensor(scores))
    assert torch.equal(answers, before)


def test_quality_is_the_overlap_of_sets_and_counts_ties_once() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    chosen = torch.tensor([[True, False, True, False], [True, True, False, False]])
    found = quality(chosen, scores, 2)
    assert found.recall == pytest.approx(0.75)  # one of two, and two of two: of equal ones the lower numbers
    assert found.captured == pytest.approx((3 + 1 + 2) / 10) and found.oracle == pytest.approx((5 + 2) / 10)
    load = np.array([2, 1, 1, 0]) / 4
    assert found.load == pytest.approx(load) and found.load_cv == pytest.approx(load.std() / load.mean())


def test_what_experts_add_sums_to_the_layer_and_its_lengths_are_theirs() -> None:
    hidden, down = torch.randn(5, NEURONS), torch.randn(WIDTH, NEURONS)
    split = LayerSplit.from_labels(np.arange(NEURONS) % EXPERTS, EXPERTS)
    found = norms_of(hidden.numpy(), down.numpy(), split)
    parts = [(hidden[:, ids].double() @ down[:, ids].double().T) for ids in map(torch.from_numpy, split.experts)]
    torch.testing.assert_close(sum(parts), hidden.double() @ down.double().T)
    np.testing.assert_allclose(found, torch.stack([part.norm(dim=1) for part in parts], 1).numpy(), rtol=1e-5)
    torch.testing.assert_close(
        output_norms(hidden, down, tuple(map(torch.from_numpy, split.experts))), torch.from_numpy(found)
    )


@pytest.mark.parametrize("kind", ["chosen", "norm"])
def test_ridge_is_the_least_squares_solution(kind: str) -> None:
    x, norms = torch.randn(200, WIDTH), torch.rand(200, EXPERTS) + 0.1
    targets = ridge_targets(norms, 2, kind)
    top = norms.argsort(1, descending=True)[:, :2]
    wanted = (
        torch.full_like(norms, -0.5).scatter(1, top, 0.5) if kind == "chosen" else norms / norms.norm(dim=1)[:, None]
    )
    torch.testing.assert_close(targets, wanted)
    sums = RidgeSums(WIDTH, EXPERTS)
    for part, target in zip(x.split(70), targets.split(70), strict=True):
        sums.add(part, target)
    damping = 0.1 * float((x.T @ x).diagonal().mean())
    stacked = torch.cat((x.double(), damping**0.5 * torch.eye(WIDTH, dtype=torch.float64)))
    zeros = torch.zeros(WIDTH, EXPERTS, dtype=torch.float64)
    solution = torch.linalg.lstsq(stacked, torch.cat((wanted.double(), zeros))).solution
    torch.testing.assert_close(sums.solve(0.1).double(), solution.T, rtol=1e-4, atol=1e-6)


def test_losses_are_means_over_tokens() -> None:
    found, scores = torch.randn(6, EXPERTS), torch.rand(6, EXPERTS)
    hard = target_loss(found, scores, GateTraining(2))
    wanted = best(scores, 2).float()
    p = torch.sigmoid(found)
    torch.testing.assert_close(hard, -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean())
    soft = target_loss(found, scores, GateTraining(2, softmax=True))
    p, q = scores.softmax(1), found.softmax(1)
    torch.testing.assert_close(soft, (p * (p / q).log()).sum(1).mean())
    assert float(balance_loss(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]), 2)) == pytest.approx(0)
    assert float(balance_loss(torch.ones(3, 1), 1)) == 0  # one expert is balanced


def planted(tokens: int = 1500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerSplit]:
    """x, answers and gate rows of a layer whose experts' rows look into directions of their own."""
    torch.manual_seed(1)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:EXPERTS]
    labels = torch.arange(NEURONS) % EXPERTS
    rows = 3 * directions[labels] + 0.2 * torch.randn(NEURONS, WIDTH)
    x = torch.randn(tokens, WIDTH)
    answers = torch.nn.functional.silu(x @ rows.T)
    return x, answers, rows, LayerSplit.from_labels(labels.numpy(), EXPERTS)


@pytest.mark.parametrize(("kind", "init"), [*((kind, "ridge") for kind in KINDS), ("mlp", "weight"), ("mlp", "random")])
def test_every_gate_finds_planted_experts_and_leaves_its_inputs_alone(kind: str, init: str) -> None:
    x, answers, rows, split = planted()
    scores = scores_of(answers.numpy(), split, "l2_norm")
    targets = np.sqrt(scores) if kind == "ridge" else None
    given = [x.numpy().copy(), scores.copy()]
    tokens = LayerTokens(x.numpy(), scores, 1200, targets)
    wish = GateWish(kind, init, GateTraining(2, epochs=40, seed=5), 0.01)
    weights, figures = fit_gate(tokens, rows.numpy(), split, wish)
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == (
        {"gate_network.0.weight": (EXPERTS, WIDTH), "gate_network.2.weight": (EXPERTS, EXPERTS)}
        if kind == "mlp"
        else {"gate_network.weight": (EXPERTS, WIDTH)}
    )
    np.testing.assert_array_equal(tokens.x, given[0])
    np.testing.assert_array_equal(tokens.scores, given[1])
    least = 0.6 if init == "random" else 0.85  # of N(0, 1) most of tanh is cut off
    assert figures["recall"] >= least and figures["captured"] >= (least + 0.05) * figures["oracle"]
    assert figures["baselines"]["random"]["recall"] == 0.5
    again, _ = fit_gate(tokens, rows.numpy(), split, wish)
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_training_keeps_the_best_epoch_and_stops_early() -> None:
    x, answers, rows, split = planted(600)
    scores = torch.from_numpy(scores_of(answers.numpy(), split, "l2_norm"))
    train, valid = GateData(x[:500].half(), scores[:500]), GateData(x[500:], scores[500:])
    start = first_weights("mlp", torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0)))
    told: list[int] = []
    how = GateTraining(2, epochs=200, patience=3, noise=True, balance=1e-3)
    fitted = train_gate(start, train, valid, how, told.append)
    assert told[-1] == min(200, fitted.epoch + 3) and len(fitted.curve.train_loss) == told[-1]
    weights = {name: weight for name, weight in fitted.weights.items() if "noise" not in name}
    assert judge_gate(weights, valid, 2).recall == pytest.approx(max(fitted.curve.valid_acc))
    assert max(fitted.curve.valid_acc) > fitted.curve.valid_acc[0]
    assert fitted.weights["weight_noise.weight"].shape == (EXPERTS, WIDTH)
    assert torch.equal(start["gate_network.2.weight"], torch.eye(EXPERTS))
    assert logits(weights, x[:0]).shape == (0, EXPERTS)


def test_texts_of_one_kind_are_clustered_together() -> None:
    draws = np.random.default_rng(0)
    kinds = np.arange(24) % 3
    rows = [draws.integers(100 * kind, 100 * kind + 40, 30) for kind in kinds]
    points = tfidf(rows)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    labels = kmeans(points, 3, seed=2)
    assert len({(kind, label) for kind, label in zip(kinds, labels, strict=True)}) == 3
    assert sorted(np.bincount(kmeans(np.ones((4, 3), np.float32), 4, 0))) == [1, 1, 1, 1]
