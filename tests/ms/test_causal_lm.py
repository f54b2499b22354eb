# SPDX-License-Identifier: Apache-2.0
"""The whole network: what counts in its loss, its types, and the lengths it accepts."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, NumericsSpec
from mindformers_ext.ms.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.ms.step import LossNetwork
from mindformers_ext.weights.convert import rule_set

PAD = 3
MODEL = ModelSpec(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    pad_token_id=PAD,
    moe=MoESpec(num_local_experts=3, num_experts_per_tok=2, capacity_factor=0.0, aux_losses=(("expert", 0.1),)),
)
IDS = np.asarray([[5, 8, PAD, 2, 9, 1, 7, 4, 6], [8, 1, 4, 28, 0, 11, PAD, PAD, PAD]], np.int32)
LABELS = np.asarray([[-100, -100, 7, 2, 9, 1, -100, 4, 6], [-100] * 9], np.int32)


def build(model: ModelSpec = MODEL, numerics: NumericsSpec | None = None) -> CausalLM:
    """A network of eight tokens with the same weights each time, whatever its types."""
    network = build_causal_lm(NetworkSpec(model=model, seq_length=8, numerics=numerics or NumericsSpec()))
    generator = np.random.default_rng(0)
    shapes = {name: shape for binding in rule_set(model).bindings for name, shape in binding.ms.items()}
    weights = {name: generator.normal(0, 0.3, shape) for name, shape in shapes.items()}
    eighths = {name: (np.round(value * 64) / 64).astype(np.float32) for name, value in weights.items()}
    MindSporeNetwork(network).load(eighths)  # multiples of 1/64: the same in every type
    return network


@pytest.mark.slow
@pytest.mark.parametrize("labels", [None, LABELS], ids=["tokens", "labels"])
def test_only_counted_tokens_enter_the_loss(mode: str, labels: np.ndarray | None) -> None:
    """A position counts unless its own token is the pad id or its label is -100."""
    network = build()
    batch = [Tensor(IDS)] if labels is None else [Tensor(IDS), Tensor(labels)]
    loss, lm_loss, aux_loss, load, dropped = LossNetwork(network)(*batch)
    target = (IDS if labels is None else labels)[:, 1:].astype(np.int64)
    logits = torch.from_numpy(network(Tensor(IDS[:, :-1])).asnumpy())
    target[IDS[:, :-1] == PAD] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(target).flatten())
    np.testing.assert_allclose(lm_loss.asnumpy(), expected.item(), rtol=1e-5)
    np.testing.assert_array_equal(loss.asnumpy(), lm_loss.asnumpy() + aux_loss.asnumpy())
    assert load.shape == (1, 3) and load.asnumpy().sum() == 2 * 16  # padding is routed like any other token
    np.testing.assert_array_equal(dropped.asnumpy(), [0.0])


def test_nothing_counted_is_no_loss_and_no_gradient() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    network = build(replace(MODEL, moe=replace(MODEL.moe, aux_losses=())))
    step = ms.value_and_grad(LossNetwork(network), None, network.trainable_params(), has_aux=True)
    (loss, *_), gradients = step(Tensor(IDS), Tensor(np.full_like(IDS, -100)))
    assert loss.asnumpy() == 0
    assert all((gradient.asnumpy() == 0).all() for gradient in gradients)


def test_a_dense_network_reports_no_experts() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    loss, lm_loss, aux_loss, load, dropped = LossNetwork(build(replace(MODEL, moe=None)))(Tensor(IDS))
    assert loss.asnumpy() == lm_loss.asnumpy() > 0 and aux_loss.asnumpy() == 0
    assert (load.asnumpy().tolist(), dropped.asnumpy().tolist()) == ([[0.0]], [0.0])


@pytest.mark.slow
# bfloat16 becomes float32 on the CPU, stored and computed
@pytest.mark.parametrize(
    ("graph", "kind", "stored", "limit"),
    [(False, "bfloat16", ms.float32, 0.0), (False, "float16", ms.float16, 2e-2), (True, "float16", ms.float16, 2e-2)],
)
def test_other_types(graph: bool, kind: str, stored: ms.Type, limit: float) -> None:
    """Logits stay float32 and near those of a float32 network; every gradient is finite and in its weight's type."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    exact = build()(Tensor(IDS[:, :-1])).asnumpy()
    numerics = NumericsSpec(compute_dtype=kind, param_dtype=kind)
    if graph:
        ms.set_context(mode=ms.GRAPH_MODE)
    network = build(numerics=numerics)
    logits = network(Tensor(IDS[:, :-1]))
    assert logits.dtype == ms.float32 and np.abs(exact).max() > 1
    assert np.abs(logits.asnumpy() - exact).max() <= limit
    parameters = network.trainable_params()
    step = ms.value_and_grad(LossNetwork(network), None, parameters, has_aux=True)
    (loss, *_), gradients = step(Tensor(IDS))
    assert loss.dtype == ms.float32
    for parameter, gradient in zip(parameters, gradients, strict=True):
        gate = "router.dense" in parameter.name  # always float32
        assert gradient.dtype == parameter.dtype == (ms.float32 if gate else stored), parameter.name
        values = gradient.astype(ms.float32).asnumpy()
        assert np.isfinite(values).all() and np.abs(values).max() > 0, parameter.name


@pytest.mark.parametrize("length", [4, 7, 9])
def test_rows_of_another_length_are_refused(mode: str, length: int) -> None:
    """Four tokens fit every shape of a network built for eight, with the wrong mask."""
    with pytest.raises(ValueError, match=f"rows of {length} tokens in a network built for seq_length=8"):
        build()(Tensor(np.ones((1, length), np.int32)))
