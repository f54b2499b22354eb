# SPDX-License-Identifier: Apache-2.0
"""Dense bases as people bring them: small ``config.json`` with every way to see and number positions, and biases."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.families import FAMILIES
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.weights.convert import to_mindspore

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "rope_theta": 1000.0,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}
# Texts of 40 tokens: beyond the windows, and beyond the positions that the scalings start from.
BASES: dict[str, dict[str, Any]] = {
    "llama3, biases": {"model_type": "llama", "rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "dynamic, window": {
        "model_type": "mistral",
        "rope_scaling": DYNAMIC,
        "max_position_embeddings": 16,
        "sliding_window": 7,
    },
    "yarn, qwen2, a window above": {
        "model_type": "qwen2",
        "rope_scaling": YARN,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "linear, qwen3, a window below, biases": {
        "model_type": "qwen3",
        "rope_scaling": LINEAR,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}
SEPARATE: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "yarn": {"model_type": "llama", "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 8.0}},
    "dynamic": {"model_type": "llama", "rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mixtral with a window": {"model_type": "mixtral", "sliding_window": 5, "num_local_experts": 4},
}
CASES = BASES | SEPARATE
LENGTH = 40
PROMPTS = (23, 4)  # tokens; of one beyond every window, of one below


@dataclass(frozen=True)
class Base:
    """A base and its input: what ``tests.helpers.parity`` asks of a case."""

    name: str
    seq_length: int = LENGTH
    batch: int = 2

    @property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        return COMMON | CASES[self.name]

    def model(self, dropless: bool = False) -> ModelSpec:
        """The model as its config says."""
        return model_spec_from_hf(self.config)

    def ids(self) -> np.ndarray:
        """(B, S+1) token ids."""
        return np.random.default_rng(7).integers(0, 101, (self.batch, self.seq_length + 1)).astype(np.int32)


@functools.cache
def transformers_model(name: str) -> torch.nn.Module:
    """transformers' own model of the config as given, with large random weights, biases included."""
    import transformers

    config = Base(name).config
    kind = getattr(transformers, FAMILIES[config["model_type"]].hf_class)
    torch.manual_seed(3)
    model = kind(kind.config_class(**config, attn_implementation="eager"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in parameter_name else parameter.normal_(0.0, 0.3)
    return model.float().eval()


@functools.cache
def reference(name: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits (B, S, V), loss and gradients under MindSpore's names of transformers' model.

    It is given the S tokens that are read, not the last one as well: a dynamic scaling follows the text's length.
    """
    transformers_model.cache_clear()
    model, ids = transformers_model(name), torch.from_numpy(Base(name).ids().astype(np.int64))
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return logits.detach().numpy(), loss.item(), to_mindspore(gradients, Base(name).model())


def answers(name: str, new: int) -> list[list[int]]:
    """What a fresh transformers model (a dynamic one remembers longer texts) answers to each prompt alone."""
    found = []
    for row, length in enumerate(PROMPTS):
        transformers_model.cache_clear()
        prompt = torch.from_numpy(Base(name).ids()[row : row + 1, :length].astype(np.int64))
        out = transformers_model(name).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        found.append(out[0, length:].tolist())
    return found
