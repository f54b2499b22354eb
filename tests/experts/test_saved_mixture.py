# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part that is saved with a LLaMA-MoE model, against the oracle's closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindformers_ext.jobs.checkpoint.model_code.mixture_llama_moe import (
    LlamaMoEGate,
    LlamaMoEMixture,
    LlamaMoEResidualMixture,
)
from tests.helpers import llama_moe_oracle as oracle
from tests.helpers.llama_moe_models import (
    UNEQUAL,
    array,
    config_of,
    form_of,
    oracle_experts,
    oracle_gate,
    randomise,
)

TOKENS = 30


def part(kind, seed: int = 0, dtype=torch.float64, **words):
    config = config_of(**words)
    made = kind(config) if kind is LlamaMoEGate else kind(config, 0)
    randomise(made, seed, std=0.4)
    return made.to(dtype), config


def tokens(seed: int = 1, count: int = TOKENS, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_noise(gate: LlamaMoEGate, z: torch.Tensor) -> LlamaMoEGate:
    gate.draw = lambda logits: z.to(logits.dtype)
    return gate.train()


CASES = [
    {},
    {"gate_network": "linear"},
    {"gate_use_softmax": False},
    {"load_compat": "reference"},
    {"load_compat": "reference", "gate_use_softmax": False},
    {"num_selects": 5},
    {"num_experts": 1, "num_selects": 1},
    {"num_selects": 1, "gate_noise_epsilon": 0.3},
    {"gate_use_balance": False},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("words", CASES, ids=str)
def test_a_gate_decides_as_the_closed_forms(words: dict, noisy: bool, dtype: torch.dtype) -> None:
    gate, config = part(LlamaMoEGate, dtype=dtype, **words)
    x = tokens(dtype=dtype)
    z = torch.randn(TOKENS, config.num_experts, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
        dtype
    )
    gate.eval()
    if noisy:
        with_noise(gate, z)
    real = torch.arange(TOKENS) < TOKENS - 4
    wanted = oracle.route(array(x), oracle_gate(gate), form_of(config), array(z) if noisy else None, real.numpy())
    got = gate(x, real)
    assert np.array_equal(got.index.numpy(), wanted.index)
    near = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    for name in ("scores", "importance", "load"):
        np.testing.assert_allclose(array(getattr(got, name)), getattr(wanted, name), **near)
    assert got.balance_loss.item() == pytest.approx(wanted.balance, rel=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("words", CASES[:5], ids=str)
def test_gradients_of_balance_reach_gate_noise_and_tokens(words: dict) -> None:
    gate, config = part(LlamaMoEGate, **words)
    x, z = tokens().requires_grad_(), torch.randn(TOKENS, 5, dtype=torch.float64)
    with_noise(gate, z)(x).balance_loss.backward()
    layers, noise, by_x = oracle.balance_gradients(array(x), oracle_gate(gate), form_of(config), array(z))
    weights = [*gate.gate_network.parameters(), gate.weight_noise.weight, x]
    for weight, wanted in zip(weights, (*layers, noise, by_x), strict=True):
        assert np.abs(wanted).max() > 1e-6
        np.testing.assert_allclose(array(weight.grad), wanted, rtol=1e-8, atol=1e-12)


def test_equal_logits_go_to_the_lower_experts() -> None:
    gate, _ = part(LlamaMoEGate, gate_network="linear")
    torch.nn.init.zeros_(gate.gate_network.weight)
    assert gate.eval()(tokens()).index.tolist() == [[0, 1]] * TOKENS


@pytest.mark.parametrize(
    "words",
    [
        {"score_scale_factor": [4.0, 1.0, 1.0]},
        {"multiply_gate_scores": False, "score_scale_factor": 4.0},
        {"size_experts": UNEQUAL, "hidden_act": "silu"},
        {"gate_use_softmax": False, "num_selects": 3},
        {"num_experts": 1, "num_selects": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, TOKENS])
def test_the_routed_output_is_the_loop_over_tokens(words: dict, count: int) -> None:
    mixture, config = part(LlamaMoEMixture, **words)
    x = tokens(count=count)
    routing = oracle.route(array(x), oracle_gate(mixture.gate), form_of(config))
    wanted = oracle.routed_output(
        array(x),
        routing,
        oracle_experts(mixture.calculator.experts),
        multiply=config.multiply_gate_scores,
        factor=config.factor("score_scale_factor", 0),
    )
    got, report = mixture.eval()(x[None])
    np.testing.assert_allclose(array(got[0]), wanted, rtol=1e-9, atol=1e-11)
    assert report.balance_loss.item() == pytest.approx(routing.balance) and report.dropped == 0


def test_experts_without_tokens_and_no_tokens_at_all() -> None:
    mixture, _ = part(LlamaMoEMixture, gate_network="linear")
    torch.nn.init.zeros_(mixture.gate.gate_network.weight)
    x = tokens().requires_grad_()
    mixture.eval()(x[None])[0].sum().backward()
    assert mixture.calculator.experts.weight_up[1].grad is not None
    assert mixture.calculator.experts.weight_up[4].grad is None
    out, report = mixture(x[None, :0])
    assert out.shape == (1, 0, 24) and report.balance_loss.item() == 0


@pytest.mark.parametrize("padding", ["zero", "input"])
@pytest.mark.parametrize("words", [{"num_selects": 1}, {"num_selects": 2, "capacity_factor": 0.7}], ids=str)
def test_a_full_expert_drops_in_training_alone(words: dict, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = {"calculator_type": "SwitchDropTokenCalculator", "dropped_padding": padding, "gate_add_noise": False}
    mixture, config = part(LlamaMoEMixture, **switch, **words)
    x, turn = tokens(), torch.randperm(TOKENS)
    monkeypatch.setattr(torch, "randperm", lambda count, device=None: turn)
    routing = oracle.route(array(x), oracle_gate(mixture.gate), form_of(config))
    limit = oracle.capacity(TOKENS, 5, config.capacity_factor, config.num_selects)
    keep = oracle.kept(routing.index, 5, limit, turn.tolist())
    experts = oracle_experts(mixture.calculator.experts)
    got, report = mixture.train()(x[None])
    wanted = oracle.routed_output(array(x), routing, experts, keep_TK=keep, padding=padding)
    np.testing.assert_allclose(array(got[0]), wanted, rtol=1e-9, atol=1e-11)
    assert report.dropped == (~keep).sum() > 0
    assert report.load.tolist() == routing.load.tolist()  # counted before dropping
    whole, report = mixture.eval()(x[None])
    np.testing.assert_allclose(array(whole[0]), oracle.routed_output(array(x), routing, experts), rtol=1e-9, atol=1e-11)
    assert report.dropped == 0


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize(
    "words", [{"score_scale_factor_residual": 2.0}, {"multiply_gate_scores_residual": False}], ids=str
)
def test_the_residual_variant(words: dict, weighting: bool) -> None:
    sizes = {"num_experts_residual": 2, "intermediate_size_moe": 30, "intermediate_size_residual": 10}
    mixture, config = part(LlamaMoEResidualMixture, use_weighting=weighting, **sizes, **words)
    x = tokens()
    routing = oracle.route(array(x), oracle_gate(mixture.moe_layer.gate), form_of(config))
    routed = oracle.routed_output(array(x), routing, oracle_experts(mixture.moe_layer.calculator.experts))
    residual = oracle.residual_output(
        array(x),
        array(mixture.residual_block.gate.gate_network.weight),
        oracle_experts(mixture.residual_block.calculator.experts),
        multiply=config.multiply_gate_scores_residual,
        factor=config.factor("score_scale_factor_residual", 0),
    )
    network = array(mixture.weighting_network[0].weight) if weighting else None
    got, _ = mixture.eval()(x[None])
    np.testing.assert_allclose(
        array(got[0]), oracle.with_residual(array(x), routed, residual, network), rtol=1e-9, atol=1e-11
    )
