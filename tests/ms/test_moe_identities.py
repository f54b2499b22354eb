# SPDX-License-Identifier: Apache-2.0
"""What an MoE layer must equal, in both modes, outputs and gradients: habit 2 of the design."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mindformers_ext.core.layers import MoESpec
from tests.helpers.moe_twin import (
    GATE,
    TOKENS,
    W1,
    W2,
    W3,
    Result,
    assert_close,
    dense_mixture,
    differentiated,
    layer_runner,
    loop,
    random_rows,
    random_weights,
    run_dense,
)

X, WEIGHT = random_rows(1), random_rows(2)


def twin(moe: MoESpec, weights: dict[str, np.ndarray], groups: int = 1, x: np.ndarray = X) -> Result:
    return differentiated(partial(loop, moe=moe, groups=groups), x, weights, random_rows(2, len(x)))


def test_one_expert_is_the_dense_layer(mode: str) -> None:
    """First in this file on purpose: a Softmax over one expert would spoil PYNATIVE's gradients of all that follow."""
    weights = random_weights(1)
    moe = MoESpec(num_local_experts=1, num_experts_per_tok=1, capacity_factor=1.0)
    found = layer_runner(moe, weights)(X, WEIGHT)
    short = {"w1.weight": W1, "w2.weight": W2, "w3.weight": W3}
    dense = run_dense(X, {name: weights[full][0] for name, full in short.items()}, WEIGHT)
    np.testing.assert_allclose(found.output, dense.output, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.gradients["x"], dense.gradients["x"], rtol=0, atol=1e-5)
    for name, full in short.items():
        np.testing.assert_allclose(found.gradients[full][0], dense.gradients[name], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.gradients[GATE], 0.0)  # a probability of 1 cannot move
    assert found.dropped == 0 and found.load.tolist() == [TOKENS]


def test_enough_capacity_is_dropless_is_the_loop(mode: str) -> None:
    """Where nothing is dropped, the drop order does not matter either."""
    weights = random_weights(5)
    words = {"num_local_experts": 5, "num_experts_per_tok": 2}
    dropless = layer_runner(MoESpec(**words, capacity_factor=-1.0, enable_sdrop=True), weights)(X, WEIGHT)
    enough = layer_runner(MoESpec(**words, capacity_factor=2.5), weights)(X, WEIGHT)
    assert_close(dropless, twin(MoESpec(**words, capacity_factor=-1.0), weights))
    assert_close(enough, dropless, atol=1e-6)


def test_all_experts_chosen_is_the_dense_mixture(mode: str) -> None:
    weights = random_weights(4, seed=3)
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=4, capacity_factor=1.0)
    found = layer_runner(moe, weights)(X, WEIGHT)
    assert_close(found, differentiated(dense_mixture, X, weights, WEIGHT))
    assert found.load.tolist() == [TOKENS] * 4


@pytest.mark.parametrize("sdrop", [False, True])
def test_a_dropped_token_yields_nothing(mode: str, sdrop: bool) -> None:
    """One or two slots per expert: the rest equals the loop, dropped tokens give 0 and get no gradient back."""
    weights = random_weights(5, seed=4)
    weights[GATE][:2] *= 3  # two experts everybody wants
    moe = MoESpec(num_local_experts=5, num_experts_per_tok=2, capacity_factor=0.25, enable_sdrop=sdrop)
    found, expected = layer_runner(moe, weights)(X, WEIGHT), twin(moe, weights)
    assert_close(found, expected)
    gone = (expected.output == 0).all(-1)
    assert 3 <= gone.sum() < TOKENS and found.dropped > 0.5
    np.testing.assert_array_equal(found.output[gone], 0.0)
    np.testing.assert_array_equal(found.gradients["x"][gone], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "sdrop"), [(0.7, True), (-1.0, False)])
def test_groups_are_separate_runs(mode: str, factor: float, sdrop: bool) -> None:
    """Three groups of six tokens: outputs side by side, weight gradients added up, each group with its own slots."""
    weights = random_weights(5, seed=6)
    moe = MoESpec(num_local_experts=5, num_experts_per_tok=2, capacity_factor=factor, enable_sdrop=sdrop)
    together = layer_runner(moe, weights, groups=3)(X, WEIGHT)
    assert_close(together, twin(moe, weights, groups=3))
    one = layer_runner(moe, weights)
    parts = [one(X[i : i + 6], WEIGHT[i : i + 6]) for i in range(0, TOKENS, 6)]
    gradients = {name: sum(part.gradients[name] for part in parts) for name in weights}
    gradients["x"] = np.concatenate([part.gradients["x"] for part in parts])
    alone = Result(
        np.concatenate([part.output for part in parts]),
        gradients,
        sum(part.load for part in parts),
        float(np.mean([part.dropped for part in parts])),
    )
    assert_close(together, alone, atol=1e-5)
    assert (together.dropped > 0) == (factor > 0)


def test_a_choice_of_one_learns_through_its_probability(mode: str) -> None:
    """k = 1: MindFormers' gate stays the probability; with norm_single_choice it is 1 and the gate learns nothing."""
    weights = random_weights(4, seed=7)
    words = {"num_local_experts": 4, "num_experts_per_tok": 1, "capacity_factor": 0.0}
    assert_close(layer_runner(MoESpec(**words), weights)(X, WEIGHT), twin(MoESpec(**words), weights))
    single = layer_runner(MoESpec(**words, norm_single_choice=True), weights)(X, WEIGHT)
    assert np.abs(single.gradients[GATE]).max() < 1e-6 < np.abs(single.gradients[W1]).max()


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"use_gating_sigmoid": True, "routed_scaling_factor": 2.5}], ids=str)
def test_grouped_experts_are_dropless_experts(mode: str, words: dict) -> None:
    """``use_gmm``: sorted rows instead of slots, the same outputs and gradients.

    Products of other sizes round otherwise: gradients of up to 7 differ by 1.2e-5.
    """
    weights = random_weights(5)
    moe = MoESpec(num_local_experts=5, num_experts_per_tok=2, capacity_factor=-1.0, **words)
    found = layer_runner(replace(moe, use_gmm=True), weights)(X, WEIGHT)
    assert_close(found, layer_runner(moe, weights)(X, WEIGHT))
    assert found.dropped == 0
