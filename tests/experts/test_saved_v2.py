# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE v2 as it is saved with its weights: beside a float64 oracle, strict loading, generation, balance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mindformers_ext.jobs.checkpoint.hf_code import with_code
from tests.helpers import llama_moe_v2_oracle as oracle
from tests.helpers.llama_moe_models import assert_same_model
from tests.helpers.llama_moe_v2_models import random_tensors, token_ids, v2_words, write_folder

pytestmark = pytest.mark.usefixtures("remote_code")
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}
ATTENTION = ["attention", "attention, finer, contract", "attention, residual", "aligned"]
IDS = torch.from_numpy(token_ids(2, 12))


def made(folder: Path, case: str, lost: str = "", **more: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], Path]:
    """A folder with our code in it."""
    words = v2_words(case, **SMALL, **more)
    drawn = random_tensors(words, std=0.3)
    held = {name: array for name, array in drawn.items() if name != lost}
    folder.mkdir()
    return words, drawn, write_folder(folder / "model", with_code(folder, words), held)


def loaded(folder: Path, **more: Any) -> Any:
    for path in folder.parent.glob("*.py"):
        path.rename(folder / path.name)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more)


@pytest.mark.parametrize("case", ["vanilla", "contract", "residual", *ATTENTION])
def test_it_computes_what_the_oracle_does_also_when_saved_again(case: str, tmp_path: Path) -> None:
    words, drawn, folder = made(tmp_path / case, case)
    model = loaded(folder)
    tensors = {name: torch.from_numpy(array).double() for name, array in drawn.items()}
    wanted = oracle.logits(words, tensors, IDS)
    torch.testing.assert_close(model(IDS).logits.double(), wanted, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_same_model(again, model, IDS)
    half = loaded(folder, dtype=torch.bfloat16)  # the gate stays float32
    kinds = {name.split(".")[-2]: weight.dtype for name, weight in half.named_parameters()}
    assert kinds["gate"] == torch.float32 and kinds["w1"] == torch.bfloat16


def test_a_missing_weight_or_word_is_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.w1.weight"
    with pytest.raises(ValueError, match=f"1 missing .{name}"):
        loaded(made(tmp_path / "lost", "contract", lost=name)[2])
    with pytest.raises(ValueError, match="top_k_attn=None"):
        loaded(made(tmp_path / "attn", "attention", top_k_attn=None)[2])
    with pytest.raises(ValueError, match="scale_factor=None"):
        loaded(made(tmp_path / "word", "vanilla", scale_factor=None)[2])


@pytest.mark.parametrize("case", ["residual", "attention, finer, contract"])
def test_generation_of_padded_texts_is_that_of_each_alone(case: str, tmp_path: Path) -> None:
    """Padded on the left; with a cache and without; beams reorder it."""
    model = loaded(made(tmp_path / "made", case)[2])
    told = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :4], mask[0, :4] = 0, 0
    both = model.generate(ids, attention_mask=mask, **told)
    assert torch.equal(both[:1, 4:], model.generate(ids[:1, 4:], **told))
    assert torch.equal(both[1:], model.generate(ids[1:], use_cache=False, **told))
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **told)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **told))


def test_the_loss_of_balance_has_a_gradient_and_counts_no_padding(tmp_path: Path) -> None:
    """K where all experts are used alike, E where one has all; the same with layers recomputed."""
    model = loaded(made(tmp_path / "made", "vanilla", router_aux_loss_coef=1.0)[2]).train()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    plain = model(IDS, attention_mask=mask, labels=IDS)
    plain.loss.backward()
    gates = [part.block_sparse_moe for part in model.model.layers]
    first = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    value = balance_of(model)
    assert 2 < value < 8 and first["model.layers.2.block_sparse_moe.gate.weight"].abs().max() > 1e-4
    other = IDS.clone()
    other[1, 8:] = 5  # what the padding is does not matter
    model.gradient_checkpointing_enable()
    model.zero_grad()
    again = model(other, attention_mask=mask, labels=torch.where(mask.bool(), IDS, -100))
    again.loss.backward()
    torch.testing.assert_close(balance_of(model), value)
    even, one = torch.full((2, 8), 1 / 8), torch.eye(8)[:1].expand(2, 8)
    for shares, wanted in ((even * torch.tensor([[2.0], [1.0]]), 2), (one, 8)):
        for gate in gates:
            gate.balance = shares
        assert balance_of(model).item() == pytest.approx(wanted)


def balance_of(model: Any) -> torch.Tensor:
    """By the saved code."""
    code = sys.modules[type(model).__module__]
    found: torch.Tensor = code.balance_loss("layerwise", [part.block_sparse_moe for part in model.model.layers], 2)
    return found


@pytest.mark.parametrize("shape", ["layerwise", "switch", "legacy_constant"])
def test_every_form_of_the_loss_of_balance_is_the_oracles(shape: str, tmp_path: Path) -> None:
    """Of feed-forward parts and heads, with gradients."""
    more: dict[str, Any] = {"num_moe_contract_layers": 0, "router_aux_loss_coef": 0.5}
    words, drawn, folder = made(tmp_path / "made", "aligned", aux_loss_type=shape, **more)
    model, ids = loaded(folder).train(), torch.from_numpy(token_ids(2, 13))
    tensors = {name: torch.from_numpy(array).double().requires_grad_() for name, array in drawn.items()}
    wanted = oracle.loss(words, tensors, ids)
    wanted.backward()
    found = model(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=2e-5)
    for name, weight in model.named_parameters():
        if "gate." in name:
            torch.testing.assert_close(weight.grad.double(), tensors[name].grad, rtol=2e-3, atol=1e-6)


def test_the_configuration_is_found_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, folder = made(tmp_path / "made", "contract")
    loaded(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.scale_factor, config.num_moe_contract_layers, config.dense_size()) == (2.5, 1, 224)
    assert "This is not supported" not in caplog.text
