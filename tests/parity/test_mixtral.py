# SPDX-License-Identifier: Apache-2.0
"""Mixtral equals transformers' MixtralForCausalLM: logits, loss, gradient of every parameter, in both modes.

`pytest -s` prints what was measured. Heads, experts, widths, heads tied or not, lengths and capacities are combined in
pairs: a graph costs seconds to compile.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.parity import MODES, Case, build_ours, check, in_modes, reference_model

FAST = [
    Case(
        "8 experts top-2, dropless",
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
    ),
    Case(
        "12 experts top-3, capacity",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=6,
        ffn=40,
        vocab=64,
        seq_length=17,
        tied=True,
        experts=12,
        chosen=3,
        capacity_factor=4.0,
        std=0.25,
    ),
    Case(
        "5 experts top-1, dropless",
        heads=4,
        kv_heads=1,
        hidden=36,
        head_dim=6,
        ffn=53,
        vocab=101,
        seq_length=17,
        tied=True,
        experts=5,
        chosen=1,
        theta=1e6,
        std=0.25,
    ),
]
SLOW = [
    Case(
        "8 of 8 experts, capacity",
        heads=4,
        kv_heads=4,
        hidden=20,
        head_dim=10,
        ffn=31,
        vocab=50,
        seq_length=12,
        tied=False,
        experts=8,
        chosen=8,
        capacity_factor=1.0,
        layers=3,
    ),
    Case(
        "5 experts top-1, capacity",
        heads=6,
        kv_heads=3,
        hidden=33,
        head_dim=4,
        ffn=53,
        vocab=101,
        seq_length=1,
        tied=False,
        experts=5,
        chosen=1,
        capacity_factor=5.0,
        sdrop=True,
    ),
    Case(
        "halved attention, dropless",
        heads=4,
        kv_heads=1,
        hidden=36,
        head_dim=6,
        ffn=53,
        vocab=101,
        seq_length=514,
        tied=False,
        experts=5,
        chosen=1,
        layers=1,
        theta=1e6,
    ),
    Case(
        "halved attention, capacity",
        heads=6,
        kv_heads=3,
        hidden=36,
        head_dim=6,
        ffn=24,
        vocab=64,
        seq_length=512,
        tied=True,
        experts=12,
        chosen=3,
        capacity_factor=4.0,
        sdrop=True,
        std=0.25,
    ),
    Case(
        "513 tokens, dropless",
        heads=4,
        kv_heads=2,
        hidden=32,
        head_dim=8,
        ffn=24,
        vocab=101,
        seq_length=513,
        tied=False,
        experts=8,
        chosen=2,
        layers=1,
        batch=1,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_equals_transformers(case: Case, mode: str) -> None:
    check(case, mode)


MORE = in_modes(SLOW, lambda case: "PYNATIVE" if "dropless" in case.name else "GRAPH", "more Mixtrals")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), MORE)
def test_equals_transformers_more(case: Case, mode: str) -> None:
    check(case, mode)


class AuxLoss(nn.Cell):
    """The auxiliary loss alone, to be differentiated."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, ids_BT: Tensor) -> Tensor:
        return self.network.losses(ids_BT)[2]


def test_auxiliary_loss_of_one_layer_is_transformers(mode: str) -> None:
    """Theirs, with its coefficient read from config.json, and its gradient of the gate, to rounding."""
    case, coefficient = (
        Case(
            "one layer",
            heads=2,
            kv_heads=1,
            hidden=16,
            head_dim=8,
            ffn=24,
            vocab=50,
            seq_length=14,
            tied=False,
            experts=6,
            chosen=2,
            layers=1,
            aux_coefficient=0.05,
        ),
        0.05,
    )
    model, ids = reference_model(case), case.ids()
    expected = coefficient * model(torch.from_numpy(ids[:, :-1].astype(np.int64)), output_router_logits=True).aux_loss
    (expected_gate,) = torch.autograd.grad(expected, [model.model.layers[0].block_sparse_moe.gate.weight])
    network = build_ours(case, to_mindspore(model.state_dict(), case.model()))
    gate = network.model.layers[0].feed_forward.router.dense.weight
    ms.set_context(mode=MODES[mode])
    found, found_gate = ms.value_and_grad(AuxLoss(network), None, gate)(Tensor(ids))
    print(f"\n{mode}: aux loss {float(found.asnumpy()):.6f}, transformers {expected.item():.6f}", end="")
    np.testing.assert_allclose(found.asnumpy(), expected.item(), rtol=0, atol=1e-6)
    assert np.abs(expected_gate.numpy()).max() > 1e-4
    np.testing.assert_allclose(found_gate.asnumpy(), expected_gate.numpy(), rtol=0, atol=1e-6)
