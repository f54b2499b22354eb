# SPDX-License-Identifier: Apache-2.0
"""Dense LLaMA equals transformers' LlamaForCausalLM: logits, loss, gradient of every parameter, in both modes."""

from __future__ import annotations

import pytest

from tests.helpers.parity import Case, check, in_modes

FAST = [
    Case(
        "4 heads of 2 kv, untied",
        heads=4,
        kv_heads=2,
        hidden=36,
        head_dim=6,
        ffn=53,
        vocab=101,
        seq_length=12,
        tied=False,
        theta=5e5,
    ),
    Case(
        "6 heads of 3 kv, tied",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=6,
        ffn=40,
        vocab=64,
        seq_length=17,
        tied=True,
        std=0.25,
    ),
]
SLOW = [
    Case(
        "4 heads of 1 kv, halved",
        heads=4,
        kv_heads=1,
        hidden=20,
        head_dim=10,
        ffn=53,
        vocab=101,
        seq_length=512,
        tied=True,
    ),
    Case(
        "6 heads of 3 kv, halved",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=8,
        ffn=40,
        vocab=64,
        seq_length=514,
        tied=False,
        std=0.25,
    ),
]


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_equals_transformers(case: Case, mode: str) -> None:
    check(case, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), in_modes(SLOW, lambda case: "GRAPH" if case is SLOW[0] else "PYNATIVE"))
def test_equals_transformers_more(case: Case, mode: str) -> None:
    check(case, mode)
