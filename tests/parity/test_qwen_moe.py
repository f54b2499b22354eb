# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE and Qwen3-MoE equal transformers' classes: logits, loss, gradient of every parameter.

Biases and norms are random, so that a forgotten one would show. ``pytest -s`` prints what was measured.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.parity import Case, check, in_modes, reference_of

FAST = [
    Case(
        "qwen2, a dense layer first",
        heads=4,
        kv_heads=2,
        hidden=32,
        head_dim=8,
        ffn=53,
        vocab=101,
        seq_length=12,
        tied=False,
        experts=8,
        chosen=2,
        expert=20,
        shared=28,
        dense_layers=(0,),
        layers=3,
        normalised=False,
        std=0.25,
        family="qwen2_moe",
    ),
    Case(
        "qwen3, a dense layer last",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=10,
        ffn=40,
        vocab=64,
        seq_length=17,
        tied=True,
        experts=12,
        chosen=3,
        expert=24,
        dense_layers=(2,),
        layers=3,
        std=0.25,
        family="qwen3_moe",
    ),
]
SLOW = [
    Case(
        "qwen2, every second layer, normalised, tied",
        heads=6,
        kv_heads=1,
        hidden=36,
        head_dim=6,
        ffn=40,
        vocab=64,
        seq_length=17,
        tied=True,
        experts=12,
        chosen=3,
        capacity_factor=4.0,
        shared=19,
        dense_layers=(0, 2),
        layers=4,
        std=0.25,
        family="qwen2_moe",
    ),
    Case(
        "qwen3, halved attention, not normalised",
        heads=4,
        kv_heads=1,
        hidden=36,
        head_dim=6,
        ffn=53,
        vocab=101,
        seq_length=512,
        tied=False,
        experts=5,
        chosen=2,
        expert=24,
        layers=1,
        normalised=False,
        theta=1e6,
        family="qwen3_moe",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_equals_transformers(case: Case, mode: str) -> None:
    check(case, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), in_modes(SLOW, lambda _: "GRAPH", "more Qwens"))
def test_equals_transformers_more(case: Case, mode: str) -> None:
    check(case, mode)


PARTS = {
    "qwen2_moe": ("wq.bias", "wk.bias", "wv.bias", "shared_experts_gate.weight", "shared_experts.w2.weight"),
    "qwen3_moe": ("q_norm.weight", "k_norm.weight"),
}


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_the_case_has_what_it_is_about(case: Case) -> None:
    """Biases, norms of heads and gates of shared experts are random, and the loss depends on them."""
    weights, reference = reference_of(case)
    for part in PARTS[case.family]:
        names = [name for name in weights if name.endswith(part)]
        assert names, part
        assert all(np.ptp(weights[name]) > 0.1 < 1e3 * np.abs(reference.gradients[name]).max() for name in names), part
