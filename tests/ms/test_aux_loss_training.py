# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss is part of the loss, reaches the gate, and balances experts that start out of balance."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.ms.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.ms.optim import FusedAdamW
from mindformers_ext.ms.step import LossNetwork, TrainStepCell

MOE = MoESpec(num_local_experts=8, num_experts_per_tok=2, capacity_factor=1.5, enable_sdrop=True)
MODEL = ModelSpec(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=-1,
    moe=MOE,
)
LENGTH, BATCH, STEPS = 16, 8, 100
GATES = [f"model.layers.{layer}.feed_forward.router.dense.weight" for layer in range(2)]


def network_of(losses: tuple[tuple[str, float], ...], extra: bool = True, **more: object) -> CausalLM:
    """The same weights each time, and a skewed start: all tokens share a direction that the first experts love."""
    model = replace(MODEL, moe=replace(MOE, aux_losses=losses, **more))
    network = build_causal_lm(NetworkSpec(model=model, seq_length=LENGTH, return_extra_loss=extra))
    generator = np.random.default_rng(0)
    for parameter in network.trainable_params():  # before anything compiles
        if "norm" in parameter.name:
            continue
        value = generator.normal(0, 0.15, parameter.shape)
        if "tok_embeddings" in parameter.name:
            value += 0.15
        if parameter.name in GATES:
            value = 0.4 * value + np.linspace(0.3, -0.3, 8)[:, None]
        parameter.set_data(Tensor(value.astype(np.float32)))
    return network


def batches(count: int) -> list[Tensor]:
    """Runs of counting with a random start and stride: something to learn."""
    generator = np.random.default_rng(1)
    start, stride = generator.integers(0, 200, (count, BATCH, 1)), generator.integers(1, 4, (count, BATCH, 1))
    ids = (start + stride * np.arange(LENGTH + 1)) % 200
    return [Tensor(each.astype(np.int32)) for each in ids]


def variation(load: np.ndarray) -> np.ndarray:
    """Coefficient of variation of each layer's load (..., L, E)."""
    return load.std(-1) / load.mean(-1)


class AuxLoss(nn.Cell):
    """The auxiliary loss alone, to be differentiated."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, ids_BT: Tensor) -> Tensor:
        return self.network.losses(ids_BT)[2]


@pytest.mark.slow
@pytest.mark.turn("auxiliary loss")
def test_the_auxiliary_loss_alone_moves_every_gate(mode: str) -> None:
    network = network_of((("expert", 0.05),))
    gates = [parameter for parameter in network.trainable_params() if parameter.name in GATES]
    gradients = ms.grad(AuxLoss(network), None, gates)(batches(1)[0])
    largest = [float(np.abs(gradient.asnumpy()).max()) for gradient in gradients]
    print(f"\n{mode}: largest gradient of the two gates from the auxiliary loss alone {largest}", end="")
    assert len(largest) == 2 and min(largest) > 1e-3


def train(factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads (steps, L, E), LM losses and auxiliary losses of a hundred steps."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = network_of((("expert", factor),))
    step = TrainStepCell(LossNetwork(network), FusedAdamW(network.trainable_params(), learning_rate=2e-3))
    step.set_train()
    outputs = [step(ids) for ids in batches(STEPS)]
    return tuple(np.stack([output[place].asnumpy() for output in outputs]) for place in (7, 5, 6))


@pytest.mark.slow
@pytest.mark.turn("auxiliary loss")
def test_a_factor_of_a_twentieth_balances_the_load() -> None:
    free, balanced = train(0.0), train(0.05)
    start = variation(free[0][0])
    np.testing.assert_array_equal(balanced[0][0], free[0][0])  # the same skewed start
    ends = [variation(load[-10:]).mean(0) for load, _, _ in (free, balanced)]
    print(
        f"\nvariation of the load per layer at the start {start.round(3)}; mean of the last 10 of {STEPS} steps: "
        f"{ends[0].round(3)} without auxiliary loss, {ends[1].round(3)} with factor 0.05; LM loss "
        f"{free[1][0]:.3f} -> {free[1][-10:].mean():.3f} and {balanced[1][-10:].mean():.3f}",
        end="",
    )
    assert (start > 0.8).all()
    assert (ends[1] <= ends[0] * 2 / 3).all()
    for _, lm_loss, _ in (free, balanced):
        assert lm_loss[-10:].mean() < 0.9 * lm_loss[:5].mean()
    assert (free[2] == 0).all() and balanced[2][-10:].mean() < balanced[2][:5].mean()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_loss_is_lm_plus_aux(reduce: str) -> None:
    """Exactly; and the layers' losses are added or averaged."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ids = batches(1)[0]
    loss, lm_loss, aux_loss, *_ = network_of((("expert", 0.05),), aux_loss_reduce=reduce).losses(ids)
    assert loss.asnumpy() == lm_loss.asnumpy() + aux_loss.asnumpy()
    other = network_of((("expert", 0.05),), aux_loss_reduce="sum").losses(ids)[2].asnumpy()
    np.testing.assert_allclose(aux_loss.asnumpy(), other / (2 if reduce == "mean" else 1), rtol=1e-6)
    assert 0.1 < other < 0.8  # two layers of 0.05 when balanced, up to four times that here


def gate_gradients(network: CausalLM) -> tuple[float, float, list[np.ndarray]]:
    """Loss, LM loss, and the gates' gradients of the loss."""
    gates = [parameter for parameter in network.trainable_params() if parameter.name in GATES]
    (loss, lm_loss, *_), gradients = ms.value_and_grad(LossNetwork(network), None, gates, has_aux=True)(batches(1)[0])
    return float(loss.asnumpy()), float(lm_loss.asnumpy()), [gradient.asnumpy() for gradient in gradients]


@pytest.mark.slow
@pytest.mark.turn("auxiliary loss")
def test_without_extra_loss_the_gate_hears_nothing_of_it() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    loss, lm_loss, gradients = gate_gradients(network_of((("expert", 0.5),), extra=False))
    _, _, of_lm_loss = gate_gradients(network_of(()))
    total, _, with_aux = gate_gradients(network_of((("expert", 0.5),)))
    assert loss == lm_loss < total
    for quiet, alone, loud in zip(gradients, of_lm_loss, with_aux, strict=True):
        np.testing.assert_array_equal(quiet, alone)
        assert np.abs(loud - alone).max() > 1e-3
