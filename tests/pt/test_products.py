# SPDX-License-Identifier: Apache-2.0
"""Inference on a CPU goes through oneDNN, expert by expert, and weights may lie in its order: the same numbers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mindformers_ext.core.layers import THRESHOLD_WORDS
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt import attention
from mindformers_ext.pt.attention import Attention
from mindformers_ext.pt.causal_lm import build_causal_lm
from mindformers_ext.pt.engine import PyTorchNetwork
from mindformers_ext.pt.layer import build_feed_forward
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.ops import products
from mindformers_ext.pt.ops.products import one_thread, prepacked, product
from tests.pt.test_moe import spec_of

LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "an expert without tokens": {"experts": 64, "chosen": 1},
    "biases": {"expert_bias": True},
    "by threshold": {"experts": 5, "chosen": 5, "gate": "threshold", **THRESHOLD_WORDS},
}


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows_of_weight", [20, 90])  # the other way round for one row
def test_a_product_is_the_plain_one(rows: int, biased: bool, rows_of_weight: int) -> None:
    x, weight, bias = (
        torch.randn(rows, 48),
        torch.randn(rows_of_weight, 48),
        torch.randn(rows_of_weight) if biased else None,
    )
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with torch.inference_mode():
        for laid in (weight, prepacked(weight, 1), prepacked(weight, 8)):
            for pool in (nullcontext, one_thread):
                with pool():
                    found = product(x, laid, bias)
                torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_a_wide_weight_stays_as_it_is_and_is_the_left_factor(biased: bool) -> None:
    rows = products.TURNED.start
    x, weight, bias = torch.randn(rows, products.WIDE), torch.randn(24, products.WIDE), torch.randn(24)
    with torch.inference_mode():
        laid = prepacked(weight, 1)
        found = product(x, laid, bias if biased else None)
    assert laid.data_ptr() == weight.data_ptr() and found.is_contiguous()
    wanted = x.double() @ weight.double().T + (bias.double() if biased else 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_one_query_by_numpy_gets_what_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the keys only those that are filled, all heads of a group with their own."""
    monkeypatch.setattr(attention, "LONG", 1)
    spec, threads = spec_of(), torch.get_num_threads()
    grouped = replace(spec.model.layer(0).attention, num_attention_heads=6, num_key_value_heads=2)
    mixer = Attention(spec, grouped)
    q = torch.randn(1, 6, 1, mixer.head_dim)
    k, v = (torch.randn(1, 2, 9, mixer.head_dim)[:, :, :7] for _ in range(2))
    with torch.inference_mode():
        wanted = mixer.mix(q, k, v)
        with one_thread():
            found = mixer.mix(q, k, v)
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_weight_of_another_type_is_turned_block_by_block(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 48 * 8)  # of 8 rows; 4 are left
    x, weight, bias = torch.randn(3, 48), torch.randn(20, 48).to(kind), torch.randn(20).to(kind)
    with torch.inference_mode():
        found, half = product(x, weight, bias), product(x.to(kind), weight)
    assert found.dtype == torch.float32 and half.dtype == kind
    torch.testing.assert_close(found, x @ weight.float().T + bias.float())


@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("kind", LAYERS)
def test_experts_in_turn_are_the_grouped_ones(kind: str, tokens: int) -> None:
    torch.manual_seed(3)
    spec = spec_of(**LAYERS[kind])
    layer, x = build_feed_forward(spec, spec.model.layer(0)), torch.randn(tokens, spec.model.hidden_size)
    assert isinstance(layer, MoE)
    if layer.ffn.bias is not None:
        torch.nn.init.normal_(layer.ffn.bias)
    wanted = layer(x).y_TD.detach()
    networks = [copy.deepcopy(layer) for _ in range(3)]
    networks[1].ffn.prepack(1)
    networks[2].ffn.prepack(1)
    networks[2].ffn.prepack(8)  # and nothing is left to do
    networks[2].ffn.prepack(1)
    with torch.inference_mode():
        for mine in networks:
            torch.testing.assert_close(mine.dropless(x), wanted, rtol=1e-5, atol=1e-5)


def test_rows_together_get_the_logits_that_each_gets_alone() -> None:
    """Several rows order the weights; the session of one row behind them reads those."""
    torch.manual_seed(4)
    base = spec_of(factor=0.0)
    network = PyTorchNetwork(build_causal_lm(NetworkSpec(model=base.model, seq_length=64)), torch.device("cpu"))
    ids = np.random.default_rng(5).integers(1, base.model.vocab_size, (3, 20)).astype(np.int32)
    lengths, places = np.array([20, 7, 13]), np.array([20, 7, 13])
    whole = [network.logits(row[None, :length])[0, -1] for row, length in zip(ids, lengths, strict=True)]
    alone = network.session(1, 20, 32)
    first = [alone.prompt(ids[[row]], lengths[[row]])[0] for row in range(3)]
    tokens = np.array([3, 4, 5])
    assert network.module.by_numpy
    by_numpy = alone.token(tokens[2:], places[2:])[0]
    together = network.session(3, 20, 32)
    assert network.module.model.layers[0].attention.wq.weight.is_mkldnn and not network.module.by_numpy
    np.testing.assert_allclose(first, whole, atol=1e-5)
    np.testing.assert_allclose(together.prompt(ids, lengths), whole, atol=1e-5)
    next_together = together.token(tokens, places)
    np.testing.assert_allclose(by_numpy, next_together[2], atol=1e-5)
    alone = network.session(1, 20, 32)
    for row in range(3):
        alone.prompt(ids[[row]], lengths[[row]])
        np.testing.assert_allclose(alone.token(tokens[[row]], places[[row]])[0], next_together[row], atol=1e-5)
