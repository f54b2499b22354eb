# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaMA-MoE models of the code that is saved with one, and what the oracle needs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mindformers_ext.jobs.checkpoint.hf_code import save_code
from mindformers_ext.jobs.checkpoint.model_code.configuration_llama_moe import LlamaMoEConfig
from mindformers_ext.jobs.checkpoint.model_code.modeling_llama_moe import LlamaMoEForCausalLM
from tests.helpers import llama_moe_oracle as oracle

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_selects": 2,
}
UNEQUAL = [[5, 11, 8, 8, 8], [8] * 5, [16, 6, 6, 6, 6]]


def config_of(**words: Any) -> LlamaMoEConfig:
    """The tiny configuration with other words."""
    return LlamaMoEConfig(**{**SIZES, **words})


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Every weight drawn anew, gates and noise as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(drawn + 1 if name.endswith("norm.weight") else drawn)


def model_of(seed: int = 0, **words: Any) -> LlamaMoEForCausalLM:
    """A tiny model, in evaluation."""
    model = LlamaMoEForCausalLM(config_of(**words)).eval()
    randomise(model, seed)
    model.tie_weights()
    return model


def folder_of(model: torch.nn.Module, folder: Path, **changes: Any) -> Path:
    """The model as a converter of ours writes it: weights, config.json, code. ``changes``: tensors by name, None: left
    out."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    tensors = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = save_code(folder, {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": None})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def array(tensor: torch.Tensor) -> np.ndarray:
    """float64."""
    return tensor.detach().double().numpy()


def oracle_gate(gate: Any) -> oracle.Gate:
    """The oracle's form of a gate's weights."""
    layers = [array(weight) for name, weight in gate.gate_network.named_parameters()]
    return oracle.Gate(tuple(layers), array(gate.weight_noise.weight))


def oracle_experts(experts: Any) -> list[oracle.Expert]:
    """The oracle's form of experts."""
    parts = (experts.weight_gate, experts.weight_up, experts.weight_down)
    return [tuple(array(weight) for weight in expert) for expert in zip(*parts, strict=True)]


def form_of(config: LlamaMoEConfig) -> oracle.GateForm:
    """How the configuration says that a gate decides."""
    return oracle.GateForm(
        chosen=config.num_selects,
        softmax=config.gate_use_softmax,
        epsilon=config.gate_noise_epsilon,
        weight=config.gate_balance_loss_weight if config.gate_use_balance else 0.0,
        released=config.load_compat == "reference",
    )


def token_ids(batch: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    """(batch, length), no padding among them."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same_model(found: torch.nn.Module, wanted: torch.nn.Module, ids: torch.Tensor) -> None:
    """Every weight bit by bit, and the answers: to rounding, for a file may put weights elsewhere among the lanes of a
    vector, and processors then sum in another order."""
    tensors = found.state_dict()
    assert tensors.keys() == wanted.state_dict().keys()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(tensors[name], weight), name
    torch.testing.assert_close(
        found(ids)[0], wanted(ids)[0], rtol=2e-2 if weight.dtype == torch.bfloat16 else 0, atol=1e-5
    )
