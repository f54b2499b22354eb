# SPDX-License-Identifier: Apache-2.0
"""Experts above a threshold in PyTorch beside the masked sum of all of them; no other expert computes a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.core.layers import THRESHOLD_WORDS
from mindformers_ext.pt.layer import build_feed_forward
from mindformers_ext.pt.moe import experts as experts_module
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.moe.observed import observed
from mindformers_ext.pt.ops.grouped import BACKENDS, LOOP
from tests.pt.test_moe import spec_of

EXPERTS, TOKENS, HIDDEN = 5, 18, 16
BIASES = {"some": [0.4, -0.3, -2.0, 1.0, -0.6], "none": [-1e3] * EXPERTS, "all": [1e3] * EXPERTS}


def layer_of(case: str, backend: str = "gmm", groups: int = 1) -> MoE:
    torch.manual_seed(1)
    spec = spec_of(EXPERTS, EXPERTS, hidden=HIDDEN, groups=groups, gate="threshold", **THRESHOLD_WORDS)
    layer = build_feed_forward(spec, spec.model.layer(0))
    layer.ffn.backend = BACKENDS[backend]
    with torch.no_grad():
        layer.router.dense.bias.copy_(torch.tensor(BIASES[case]))
    return layer


def rows() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))


def masked_sum(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D), and which expert each token passes (T, E)."""
    gate = layer.router.dense
    chosen = x @ gate.weight.T + gate.bias >= 0
    total = torch.zeros_like(x)
    for e in range(EXPERTS):
        one, two = (x @ layer.ffn.gate_up[e].T).chunk(2, -1)
        total = total + chosen[:, [e]] * ((F.silu(one) * two) @ layer.ffn.down[e].T)
    return total, chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BIASES)
def test_layer_and_gradients_are_those_of_the_masked_sum(case: str, backend: str) -> None:
    layer, weight = layer_of(case, backend, groups=2), torch.randn(TOKENS, HIDDEN)
    x = rows().requires_grad_()
    wanted, chosen = masked_sum(layer, x)
    counts = {*chosen.sum(1).tolist()}
    assert len(counts) > 3 if case == "some" else counts == {0 if case == "none" else EXPERTS}
    found = layer(x)
    torch.testing.assert_close(found.y_TD, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.dropless(x), wanted, rtol=1e-4, atol=1e-5)
    assert found.report_GE.sum(0).tolist() == [*chosen.sum(0).tolist(), 0.0] and not found.aux_loss_G.any()
    learnt = [x, layer.ffn.gate_up, layer.ffn.down]
    theirs = torch.autograd.grad((wanted * weight).sum(), learnt)
    ((found.y_TD * weight).sum() + found.aux_loss_G.sum()).backward()
    for mine, other in zip(learnt, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other, rtol=1e-4, atol=1e-5)
    gate = layer.router.dense
    assert not gate.weight.grad.any() and not gate.bias.grad.any()  # zero, not missing


def test_an_expert_computes_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single token goes through its experts one after the other."""
    layer, x, computed = layer_of("some"), rows(), list[int]()
    grouped, product = experts_module.grouped_product, experts_module.product

    def counted(rows: Tensor, weight: Tensor, offs: Tensor, backend: Any) -> Tensor:
        computed.append(int(offs[-1]))
        return grouped(rows, weight, offs, backend)

    monkeypatch.setattr(experts_module, "grouped_product", counted)
    wanted, chosen = masked_sum(layer, x)
    layer(x)
    layer.dropless(x)
    assert computed == [int(chosen.sum())] * 4
    layer.ffn.backend = LOOP

    def called(x: Tensor, weight: Tensor) -> Tensor:
        computed.append(len(weight))
        return product(x, weight)

    monkeypatch.setattr(experts_module, "product", called)
    for place in range(TOKENS):
        computed.clear()
        found = layer.dropless(x[place : place + 1])
        torch.testing.assert_close(found, wanted[place : place + 1], rtol=1e-4, atol=1e-5)
        assert len(computed) == 2 * int(chosen[place].sum())  # two products of an expert


def test_padding_is_in_no_report_and_a_probe_sees_what_is_passed() -> None:
    layer, x = layer_of("some"), rows()
    chosen, counted = masked_sum(layer, x)[1], torch.arange(TOKENS) % 3 > 0
    assert layer(x, None, counted).report_GE[0, :-1].tolist() == chosen[counted].sum(0).tolist()
    seen = observed(layer, x)
    assert torch.equal(seen["chosen"], chosen.double()) and torch.equal(seen["gate_weights"], chosen.float())
    assert torch.equal(seen["expert_norms"] > 0, chosen)
