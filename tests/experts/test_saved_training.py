# SPDX-License-Identifier: Apache-2.0
"""The model saved with its weights in training, its switches, and what it refuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.llama_moe_models import UNEQUAL, assert_same_model, config_of, folder_of, model_of, token_ids


def test_noise_is_in_training_alone_and_seeded() -> None:
    model, x = model_of(), token_ids()
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(x).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.set_moe_gate_add_noise(False)
    assert torch.equal(model(x).logits, model.eval()(x).logits)


def test_the_loss_is_that_of_tokens_and_of_balance_in_every_layer() -> None:
    model, x = model_of(gate_balance_loss_weight=0.5).train(), token_ids()
    torch.manual_seed(5)
    got = model(x, labels=x)
    tokens = torch.nn.functional.cross_entropy(got.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert got.balance_loss > 0.01 and got.gate_load.shape == got.gate_importance.shape == (3, 5)
    torch.testing.assert_close(got.loss, tokens + got.balance_loss)
    by_layer = [(v.var(-1) / v.mean(-1) ** 2).sum() for v in (got.gate_load, got.gate_importance)]
    torch.testing.assert_close(got.balance_loss, 0.5 * sum(by_layer))
    got.loss.backward()
    gate = model.model.layers[2].mlp.gate
    assert gate.weight_noise.weight.grad.any() and gate.gate_network[0].weight.grad.any()
    assert model.eval()(x).balance_loss is None
    model.set_moe_gate_use_balance(False)
    assert model(x, labels=x).balance_loss == 0


def test_padding_is_not_counted() -> None:
    model, x = model_of(), token_ids()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    got = model(x, attention_mask=mask, labels=x)
    assert got.gate_load.sum(1).tolist() == [2 * (24 - 5)] * 3


def test_recomputation_changes_no_gradient() -> None:
    plain, x = model_of().train(), token_ids()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable()
    for model in (plain, again):
        torch.manual_seed(7)
        model(x, labels=x).loss.backward()
    theirs = dict(again.named_parameters())
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name].grad)


def test_switches_change_the_network_and_its_configuration() -> None:
    model, x = model_of(), token_ids()
    before = model(x).logits
    model.set_moe_num_selects(3)
    assert model.config.num_selects == 3 and not torch.equal(model(x).logits, before)
    model.set_moe_num_selects(2)
    assert torch.equal(model(x).logits, before)
    model.set_moe_calculator_score_scale_factor(4.0, layer_index=1)
    assert model.config.score_scale_factor == [1.0, 4.0, 1.0] and not torch.equal(model(x).logits, before)
    model.set_moe_calculator_score_scale_factor(1.0)
    gate = model.model.layers[0].mlp.gate
    gates, experts = copy.deepcopy(gate.state_dict()), model.model.layers[0].mlp.calculator.experts
    kept = experts.weight_up[0].clone()
    model.reset_gate_network()
    assert not torch.equal(gate.gate_network[0].weight, gates["gate_network.0.weight"])
    assert torch.equal(experts.weight_up[0], kept)
    model.reset_experts()
    assert not torch.equal(experts.weight_up[0], kept) and experts.weight_up[0].abs().max() <= 24**-0.5


def test_switches_refuse_what_is_not_there_or_not_allowed() -> None:
    model = model_of()
    for call in (
        lambda: model.set_moe("no_such_switch", 1),
        lambda: model.set_moe_calculator_drop_tokens(True),
        lambda: model.set_moe_residual_gate_use_softmax(True),
        lambda: model.reset_residual_experts(),
    ):
        with pytest.raises(KeyError):
            call()
    dropping = model_of(calculator_type="SwitchDropTokenCalculator")
    for call in (
        lambda: model.set_moe_num_selects(6),
        lambda: model.set_moe_num_selects(0),
        lambda: model.set_moe_calculator_score_scale_factor([1.0]),
        lambda: model.set_moe_calculator_score_scale_factor(1.0, layer_index=3),
        lambda: dropping.set_moe_calculator_dropped_padding("ones"),
        lambda: dropping.set_moe_calculator_capacity_factor(0),
    ):
        with pytest.raises(ValueError):
            call()
    assert model.config.num_selects == 2 and dropping.config.dropped_padding == "zero"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_selects": 6}, "num_selects=6: 1 to num_experts=5"),
        ({"gate_network": "deep"}, "gate_network='deep': allowed are mlp, linear"),
        ({"gate_type": "SwitchGate"}, "gate_type='SwitchGate': allowed are"),
        ({"calculator_type": "Other"}, "calculator_type='Other': allowed are"),
        ({"num_experts": 7}, "40 neurons cannot be shared by 7 experts"),
        ({"size_experts": UNEQUAL[:2]}, "size_experts has 2 lists, layer 2 has none"),
        ({"size_experts": [[5, 5, 10, 10, 9]] * 3}, "5 sizes of 1 or more that sum to 40 are wanted"),
        ({"score_scale_factor": [1.0, 2.0]}, "score_scale_factor has 2 values for 3 layers"),
        ({"num_experts_residual": 2}, "0 neurons cannot be shared by 2 experts: give size_experts_residual"),
        ({"num_experts_residual": 2, "intermediate_size_moe": 20, "intermediate_size_residual": 10}, "40 is not"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "other"}}, "rope_type='other': allowed are"),
        ({"load_compat": "released"}, "load_compat='released': allowed are"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_network_is_refused(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**words)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="inputs_embed"):
        model_of()(token_ids(), inputs_embed=torch.ones(1))
    with pytest.raises(ValueError, match="one of"):
        model_of().model()


@pytest.mark.usefixtures("remote_code")
def test_the_residual_variant_loads_and_trains(tmp_path: Path) -> None:
    sizes = {"num_experts_residual": 2, "intermediate_size_moe": 30, "intermediate_size_residual": 10}
    model, x = model_of(use_weighting=True, **sizes), token_ids()
    assert {
        "model.layers.0.mlp.moe_layer.gate.gate_network.0.weight",
        "model.layers.0.mlp.moe_layer.calculator.experts.weight_down.4",
        "model.layers.0.mlp.residual_block.gate.gate_network.weight",
        "model.layers.0.mlp.residual_block.calculator.experts.weight_up.1",
        "model.layers.0.mlp.weighting_network.0.weight",
    } <= set(model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(folder_of(model, tmp_path), trust_remote_code=True)
    assert_same_model(loaded, model, x)
    loaded.set_moe_residual_calculator_score_scale_factor(2.0, layer_index=0)
    assert not torch.equal(loaded(x).logits, model(x).logits)
    loaded.train()(x, labels=x).loss.backward()
    assert loaded.model.layers[1].mlp.residual_block.calculator.experts.weight_up[0].grad.any()
    loaded.reset_residual_experts()


def test_first_weights_are_drawn_and_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = model_of(hidden_size=32, num_hidden_layers=2)
    fresh = type(model)(model.config)
    experts, gate = fresh.model.layers[1].mlp.calculator.experts, fresh.model.layers[1].mlp.gate
    assert all(weight.any() for weight in experts.parameters()) and not gate.weight_noise.weight.any()
    assert fresh.model.norm.weight.eq(1).all() and experts.weight_up[0].abs().max() <= 32**-0.5
    optimizer, x = torch.optim.AdamW(fresh.train().parameters(), 3e-3), token_ids(8, 16)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        output = fresh(x, labels=x)
        output.loss.backward()
        optimizer.step()
        losses.append((output.loss - output.balance_loss).item())
    load = output.gate_load.float()
    assert losses[-1] < losses[0] - 1 and (load.std(1) / load.mean(1)).max() < 1
