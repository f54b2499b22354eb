# SPDX-License-Identifier: Apache-2.0
"""The router's integers equal plain loops over tokens; of equal experts the lower number comes first."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.pt.moe.gate import TopkChoice
from mindformers_ext.pt.moe.slots import Routing, apply_slots, build_slots
from tests.helpers.routing import CHOICES, HARD, capacity_of, chosen_experts, hard_logits, route

SIZES = [(4, 2), (7, 3), (16, 1), (5, 5)]
FACTORS = (0.5, 1.0, 1.1, 2.0, -1.0)


def routed(moe: MoESpec, logits: np.ndarray, mp: int = 1) -> tuple[Routing, np.ndarray]:
    """Our decision, and the probabilities it was made from."""
    parallel = ParallelSpec(data_parallel=len(logits), model_parallel=mp)
    tensor = torch.from_numpy(logits)
    found = apply_slots(TopkChoice(moe, parallel)(tensor), build_slots(moe, parallel))
    return found, torch.softmax(tensor, -1).numpy()


def slots(found: Routing, capacity: int, sdrop: bool) -> np.ndarray:
    """MindFormers' ``combine``: expert * (1 + C) + 1 + place, place part 0 = dropped, by counting kept ones."""
    expert = found.expert_GNK.numpy()
    kept = np.ones(expert.shape, bool) if found.kept_GNK is None else found.kept_GNK.numpy()
    G, N, K = expert.shape
    order = list(np.ndindex(N, K)) if sdrop else [(n, k) for k in range(K) for n in range(N)]
    out = expert * (capacity + 1)
    for g in range(G):
        filled = np.zeros(expert.max() + 1, int)
        for n, k in order:
            if kept[g, n, k]:
                filled[expert[g, n, k]] += 1
                out[g, n, k] += filled[expert[g, n, k]]
    return out


@pytest.mark.parametrize(("factor", "sdrop", "mp"), [*itertools.product(FACTORS, (False, True), (1, 4))])
def test_equals_plain_loops(factor: float, sdrop: bool, mp: int) -> None:
    for experts, chosen in SIZES:
        moe = MoESpec(num_local_experts=experts, num_experts_per_tok=chosen, capacity_factor=factor, enable_sdrop=sdrop)
        logits = hard_logits(11, experts, seed=experts)
        found, probabilities = routed(moe, logits, mp)
        expected = route(probabilities, moe, mp)
        largest = int(found.counts_GE.max())
        assert expected.capacity == capacity_of(moe, 11, largest, mp)
        for g, name in enumerate(HARD):
            np.testing.assert_array_equal(slots(found, expected.capacity, sdrop)[g], expected.combine[g], err_msg=name)
        np.testing.assert_allclose(found.weight_GNK.numpy(), expected.coeff, atol=1e-7)
        np.testing.assert_array_equal(found.counts_GE.sum(0).numpy(), expected.load)
        np.testing.assert_allclose(found.dropped_G.mean(), expected.dropped, atol=1e-6)


@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("chosen", [1, 3])
def test_choices_equal_plain_loops(words: dict, chosen: int) -> None:
    moe = MoESpec(
        num_local_experts=8, num_experts_per_tok=chosen, capacity_factor=0.7, n_group=4, topk_group=2, **words
    )
    logits = hard_logits(9, 8)
    parallel = ParallelSpec(data_parallel=len(logits))
    router = TopkChoice(moe, parallel)
    bias = np.linspace(0.3, 0.0, 8).astype(np.float32)
    if moe.balance_via_topk_bias:
        router.topk_bias.copy_(torch.from_numpy(bias))
    tensor = torch.from_numpy(logits)
    prob = (torch.sigmoid(tensor) if moe.use_gating_sigmoid else torch.softmax(tensor, -1)).numpy()
    index = chosen_experts(prob, moe, bias if moe.balance_via_topk_bias else None)
    found, expected = apply_slots(router(tensor), build_slots(moe, parallel)), route(prob, moe, index_GNK=index)
    np.testing.assert_array_equal(found.expert_GNK.numpy(), index)
    np.testing.assert_array_equal(slots(found, expected.capacity, False), expected.combine)
    np.testing.assert_allclose(found.weight_GNK.numpy(), expected.coeff, atol=1e-6)


@pytest.mark.parametrize("kind", ["expert", "device", "comm"])
def test_auxiliary_losses_are_their_factors_when_balanced(kind: str) -> None:
    logits = torch.zeros(2, 8, 4)
    for n in range(8):
        logits[:, n, n % 4] = 20.0
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=1, aux_losses=((kind, 0.03),), expert_group_size=2)
    router = TopkChoice(moe, ParallelSpec(data_parallel=2, expert_parallel=2))
    np.testing.assert_allclose(router(logits).aux_loss_G.numpy(), 0.03, rtol=1e-6)
    z = TopkChoice(replace(moe, aux_losses=(), z_loss_factor=0.1))(logits + 500.0).aux_loss_G
    assert torch.isfinite(z).all() and float(z[0]) == pytest.approx(0.1 * 520.0**2, rel=1e-4)


def test_evaluation_drops_nothing_where_it_shall_not() -> None:
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=0.25)
    choice = TopkChoice(moe)(torch.randn(1, 16, 4))
    assert float(apply_slots(choice, build_slots(moe, ParallelSpec()), training=False).dropped_G) > 0.5
    rule = build_slots(moe, ParallelSpec(), only_in_training=True)
    assert apply_slots(choice, rule, training=False).kept_GNK is None
    assert float(apply_slots(choice, rule, training=True).dropped_G) > 0.5
