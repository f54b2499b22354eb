# SPDX-License-Identifier: Apache-2.0
"""The saved model whose experts are chosen by a threshold, beside transformers' LLaMA with the same neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mindformers_ext.jobs.checkpoint.model_code.configuration_llama_moe import BY_THRESHOLD
from mindformers_ext.jobs.checkpoint.model_code.modeling_llama_moe import LlamaMoEForCausalLM
from tests.helpers.llama_moe_models import SIZES, assert_same_model, config_of, folder_of, model_of, token_ids

pytestmark = pytest.mark.usefixtures("remote_code")
WORDS: dict[str, Any] = {**BY_THRESHOLD, "gate_network": "threshold", "num_selects": 5}
SHARED = {"num_experts_residual": 1, "intermediate_size_moe": 30, "intermediate_size_residual": 10}


def mixture(shared: bool = True, bias: float | None = None) -> LlamaMoEForCausalLM:
    """5 experts, beside a shared one or not; ``bias``: that of all gates."""
    model = model_of(**WORDS, **(SHARED if shared else {}))
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "moe_layer", layer.mlp).gate
        if bias is not None:
            nn.init.constant_(gate.gate_network.bias, bias)
    return model


class Masked(nn.Module):
    """A layer's experts as one feed-forward, whose hidden values are kept where their expert's score is 0 or more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        routed = getattr(layer.mlp, "moe_layer", layer.mlp)
        parts = [routed.calculator.experts]
        if routed is not layer.mlp:
            parts.append(layer.mlp.residual_block.calculator.experts)
        self.gate = torch.cat([w for part in parts for w in part.weight_gate])
        self.up = torch.cat([w for part in parts for w in part.weight_up])
        self.down = torch.cat([w for part in parts for w in part.weight_down], 1)
        self.sizes = [len(w) for w in parts[0].weight_gate]
        self.network = routed.gate.gate_network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (self.network(x) >= 0).to(x.dtype)
        mask = chosen.repeat_interleave(torch.tensor(self.sizes), -1)
        mask = nn.functional.pad(mask, (0, len(self.gate) - mask.shape[-1]), value=1.0)
        self.counts = chosen.sum(-1)
        return ((nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)) * mask) @ self.down.T


def masked(model: LlamaMoEForCausalLM) -> LlamaForCausalLM:
    """transformers' LLaMA around it."""
    words = {name: SIZES[name] for name in SIZES if not name.startswith(("num_experts", "num_selects"))}
    dense = LlamaForCausalLM(LlamaConfig(**words, rms_norm_eps=model.config.rms_norm_eps, pad_token_id=0)).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".mlp." not in k}, strict=False)
    for layer, own in zip(dense.model.layers, model.model.layers, strict=True):
        layer.mlp = Masked(own)
    return dense


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("bias", "passed"), [(None, None), (1e9, 5), (-1e9, 0)])
def test_it_adds_up_the_experts_above_the_threshold(shared: bool, bias: float | None, passed: int | None) -> None:
    """Below every score all experts and the shared one are the dense layer, above every score the shared one is left,
    or nothing; between, tokens pass none, some and all."""
    model, ids = mixture(shared, bias), token_ids(4, 40)
    dense = masked(model)
    got, wanted = model(ids, labels=ids), dense(ids, labels=ids)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=1e-6)
    counts = {int(count) for layer in dense.model.layers for count in layer.mlp.counts.unique()}
    assert counts == ({0, 1, 2, 3, 4, 5} if passed is None else {passed})
    loads = torch.stack([layer.mlp.counts.sum() for layer in dense.model.layers])
    torch.testing.assert_close(got.gate_load.sum(1), loads)
    assert got.balance_loss == 0


def test_a_layer_whose_experts_nobody_passes_is_trained_on() -> None:
    model, ids = mixture(bias=-1e9).train(), token_ids()
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp
    assert layer.residual_block.calculator.experts.weight_down[0].grad.any()
    assert not any(w.grad is not None and w.grad.any() for w in layer.moe_layer.calculator.experts.parameters())


def test_gradients_are_those_of_transformers_llama() -> None:
    model, ids = mixture().train(), token_ids()
    learnt = [weight for name, weight in model.named_parameters() if ".mlp." in name and ".gate." not in name]
    losses = model(ids, labels=ids).loss, masked(model)(ids, labels=ids).loss
    for found, wanted in zip(*(torch.autograd.grad(loss, learnt) for loss in losses), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_folder_is_loaded_and_generates_with_left_padding(tmp_path: Path) -> None:
    model, ids = mixture(), token_ids(length=7)
    loaded = AutoModelForCausalLM.from_pretrained(folder_of(model, tmp_path), trust_remote_code=True)
    assert_same_model(loaded, model, ids)
    told = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    found = loaded.generate(ids, attention_mask=mask, **told)
    assert torch.equal(found, masked(model).generate(ids, attention_mask=mask, **told))
    assert torch.equal(found[:1, 3:], loaded.generate(ids[:1, 3:], **told))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_selects", 2),
        ("gate_use_softmax", True),
        ("gate_use_balance", True),
        ("gate_add_noise", True),
        ("multiply_gate_scores", True),
        ("score_scale_factor", 2.0),
        ("load_compat", "reference"),
        ("calculator_type", "SwitchDropTokenCalculator"),
        ("add_weight_norm", True),
    ],
)
def test_words_that_mean_nothing_with_a_threshold_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* with gate_network='threshold': only"):
        config_of(**{**WORDS, name: value})


def test_switches_that_mean_nothing_with_a_threshold_change_nothing() -> None:
    model = mixture()
    with pytest.raises(ValueError, match="with gate_network='threshold'"):
        model.set_moe_num_selects(2)
    assert model.config.num_selects == 5
    model.reset_gate_network()
    assert not model.model.layers[0].mlp.moe_layer.gate.gate_network.bias.any()
