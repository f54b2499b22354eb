# SPDX-License-Identifier: Apache-2.0
"""The train step: what it returns, when it updates, and how it accumulates."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.figures import figures_of
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.lora import adapter_parameters, add_lora
from mindformers_ext.ms.step import SEED_STRIDE, LossNetwork, TrainStepCell, step_state
from mindformers_ext.ms.strategies import Shards

MODEL = ModelSpec(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
)
MOE = replace(MODEL, moe=MoESpec(num_local_experts=4, num_experts_per_tok=2, aux_losses=(("expert", 0.05),)))
IDS = np.random.default_rng(0).integers(1, 50, (4, 9)).astype(np.int32)


def step_cell(model=MODEL, lr=0.1, **options):
    ms.set_seed(3)
    network = build_causal_lm(NetworkSpec(model=model, seq_length=8))
    optimizer = nn.SGD(network.trainable_params(), learning_rate=lr)
    cell = TrainStepCell(LossNetwork(network), optimizer, **options)
    cell.set_train()
    return network, cell


def weights_of(network):
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


def run(cell, ids=IDS):
    return figures_of(cell(Tensor(ids)))


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request):
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.slow
def test_outputs_and_clipped_update(mode):
    network, cell = step_cell(MOE, max_grad_norm=0.05)
    before = weights_of(network)
    out = run(cell)
    after = weights_of(network)
    assert not out.overflow and out.loss_scale == 1.0 and out.learning_rate == pytest.approx(0.1)
    assert out.loss == pytest.approx(out.lm_loss + out.aux_loss, abs=1e-6) and out.aux_loss > 0.04
    assert out.expert_load.shape == (1, 4) and out.expert_load.sum() == 2 * 4 * 8
    moved = np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before))
    assert out.global_norm > 0.05  # so the clip was at work: SGD moves lr * max_grad_norm
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_gradients_summed_over_copies_of_the_loss_are_averaged():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    norms = [run(step_cell(max_grad_norm=None, copies=copies)[1]).global_norm for copies in (1, 4)]
    ms.set_context(mode=ms.GRAPH_MODE)
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-6)


@pytest.mark.slow
def test_micro_batches_equal_the_whole_batch(mode):
    whole, cell = step_cell(max_grad_norm=None)
    first = run(cell)
    parts, cell = step_cell(max_grad_norm=None, micro_batches=4)
    second = run(cell)
    assert second.loss == pytest.approx(first.loss, abs=1e-6)
    assert second.global_norm == pytest.approx(first.global_norm, rel=1e-5)
    for name, value in weights_of(whole).items():
        np.testing.assert_allclose(weights_of(parts)[name], value, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_micro_batches_add_their_load():
    _, cell = step_cell(MOE, micro_batches=2)
    assert run(cell).expert_load.sum() == 2 * 4 * 8


def test_overflow_skips_the_update_and_halves_the_scale(mode):
    scale = nn.DynamicLossScaleUpdateCell(2.0**10, 2, 2)
    network, cell = step_cell(scale_sense=scale)
    good = weights_of(network)
    broken = good["lm_head.weight"].copy()
    broken[3, 0] = np.inf
    network.lm_head.weight.set_data(Tensor(broken))
    out = run(cell)
    assert out.overflow and out.loss_scale == 2.0**9
    for name, value in weights_of(network).items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(value, good[name], err_msg=name)
    network.lm_head.weight.set_data(Tensor(good["lm_head.weight"]))
    scales = [float(run(cell).loss_scale) for _ in range(4)]
    assert scales[-1] > 2.0**9  # two good steps in a row double it again
    assert set(step_state(cell)) == {"scale_sense", "current_iterator_step", "last_overflow_iterator_step"}


@pytest.mark.slow
def test_the_loss_scale_does_not_change_the_update():
    plain, cell = step_cell(max_grad_norm=None)
    run(cell)
    scaled, cell = step_cell(max_grad_norm=None, scale_sense=1024.0)
    run(cell)
    for name, value in weights_of(plain).items():
        np.testing.assert_allclose(weights_of(scaled)[name], value, atol=1e-6, err_msg=name)


def test_the_schedule_s_rate_is_reported():
    ms.set_seed(3)
    network = build_causal_lm(NetworkSpec(model=MODEL, seq_length=8))
    optimizer = nn.SGD(network.trainable_params(), learning_rate=nn.ExponentialDecayLR(0.1, 0.5, 1))
    cell = TrainStepCell(LossNetwork(network), optimizer)
    cell.set_train()
    assert [float(run(cell).learning_rate) for _ in range(3)] == pytest.approx([0.1, 0.05, 0.025])


class Adapted(nn.Cell):
    """One adapted layer, whose loss depends on what dropout keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = Linear(32, 4, 0.5, ms.float32, Shards(None), "project in")
        self.zero = Tensor(np.zeros((1, 1), np.float32))

    def construct(self, x_TD):
        loss = self.wq(x_TD).square().mean()
        return loss, loss, loss, self.zero, self.zero[0]


def test_two_equal_micro_batches_drop_differently(mode):
    ms.set_seed(3)
    network = Adapted()
    add_lora(network, LoraSpec(rank=2, alpha=4, dropout=0.5, targets="wq"))
    network.wq.lora_b.set_data(Tensor(np.ones((4, 2), np.float32)))
    held = network.wq.seeds
    rows = Tensor(np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32))

    def loss(seed, micro_batches):
        held.set_data(Tensor(np.array([seed]), ms.int32))
        frozen = nn.SGD(adapter_parameters(network), learning_rate=0.0)
        cell = TrainStepCell(network, frozen, micro_batches=micro_batches)
        cell.set_train()
        return figures_of(cell(ms.ops.cat([rows] * micro_batches))).loss

    first, second = loss(7, 1), loss(7 + SEED_STRIDE, 1)
    assert abs(first - second) > 1e-3
    assert loss(7, 2) == pytest.approx((first + second) / 2, rel=1e-5)
