# SPDX-License-Identifier: Apache-2.0
"""Tiny dense LLaMAs and LLaMA-MoE v2 models as folders: words of config.json, and tensors by the files' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
V2: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "moe_type": "modulelist",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 28,
    "intermediate_size_residual": None,
    "scale_factor": 4.0,
    "num_moe_contract_layers": 0,
    "router_aux_loss_coef": 0.0,
    "sliding_window": None,
    "use_attn_moe": False,
    "attn_experts": None,
    "top_k_attn": None,
    "scale_factor_attn": None,
    "add_rescale_bias": False,
    "use_layer_wise_balance": False,
}
CASES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "contract": {"num_moe_contract_layers": 1, "scale_factor": 2.5, "num_experts_per_tok": 3},
    "residual": {"num_local_experts": 7, "num_experts_per_tok": 1, "intermediate_size_residual": 28}
    | {"scale_factor": 1.5, "num_moe_contract_layers": 1, "intermediate_size_dense": 224},
}

ATTENTION = {"use_attn_moe": True, "attn_experts": 4, "top_k_attn": 2, "scale_factor_attn": 1.5}
CASES["attention"] = ATTENTION
CASES["attention, finer, contract"] = {**CASES["contract"], **ATTENTION, "attn_experts": 8, "top_k_attn": 3}
CASES["attention, residual"] = {**CASES["residual"], **ATTENTION, "top_k_attn": 1, "router_aux_loss_coef": 0.05}

CASES["aligned"] = {**CASES["attention, residual"], "top_k_attn": 2, "num_experts_per_tok": 2, "add_rescale_bias": True}


def v2_words(case: str, **more: Any) -> dict[str, Any]:
    """config.json of one of ``CASES``, as the published converter writes it but for the window."""
    return {**DENSE, **V2, **CASES[case], **more}


def tensor_shapes(words: Mapping[str, Any], llama_names: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a file (spec of LLaMA-MoE v2, section 1); ``llama_names``: of dense layers."""
    hidden, vocab = words["hidden_size"], words["vocab_size"]
    layers = words["num_hidden_layers"]
    experts, own = words.get("num_local_experts", 0), words["intermediate_size"]
    always, ends = words.get("intermediate_size_residual") or 0, words.get("num_moe_contract_layers", 0)
    whole = (words.get("intermediate_size_dense") or experts * own + always) if experts else own
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}{name}.weight"] = (hidden,)
        is_dense = not experts or not ends <= layer < layers - ends
        shapes |= attention_shapes(words, f"{start}self_attn.", 0 if is_dense else words.get("attn_experts") or 0)
        if is_dense:
            names = ("gate_proj", "down_proj", "up_proj") if llama_names or not experts else ("w1", "w2", "w3")
            parts = [("mlp." if llama_names or not experts else "block_sparse_moe.", names, whole)]
        else:
            shapes[f"{start}block_sparse_moe.gate.weight"] = (experts, hidden)
            parts = [(f"block_sparse_moe.experts.{e}.", ("w1", "w2", "w3"), own) for e in range(experts)]
            parts += [("mlp_residual.", ("w1", "w2", "w3"), always)] if always else []
            if words.get("add_rescale_bias"):
                shapes |= {f"{start}block_sparse_moe.experts.{e}.w2.bias": (hidden,) for e in range(experts)}
        for prefix, (gate, down, up), size in parts:
            shapes |= {f"{start}{prefix}{name}.weight": (size, hidden) for name in (gate, up)}
            shapes[f"{start}{prefix}{down}.weight"] = (hidden, size)
    return shapes


def attention_shapes(words: Mapping[str, Any], start: str, experts: int) -> dict[str, tuple[int, ...]]:
    """Of one layer; ``experts`` 0: plain."""
    hidden, heads = words["hidden_size"], words["num_attention_heads"]
    groups, width = words["num_key_value_heads"], hidden // heads
    parts = [("", heads, groups)] if not experts else [(f"{e}.", heads // experts, 1) for e in range(experts)]
    shapes = {f"{start}gate.weight": (experts, hidden)} if experts else {}
    for part, queries, keys in parts:
        for name, count in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{start}{name}_proj.{part}weight"] = (count * width, hidden)
        shapes[f"{start}o_proj.{part}weight"] = (hidden, queries * width)
        if part and words.get("add_rescale_bias"):
            shapes[f"{start}o_proj.{part}bias"] = (hidden,)
    return shapes


def random_tensors(words: Mapping[str, Any], seed: int = 0, std: float = 0.1, **more: Any) -> dict[str, np.ndarray]:
    """float32 values of all of them; norms around 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * std + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in tensor_shapes(words, **more).items()
    }


def write_folder(folder: Path, words: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """A model's folder, of one file or several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(words)), "utf-8")
    names = sorted(tensors)
    parts = [names[place::shards] for place in range(shards)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{place + 1:05}-of-{shards:05}.safetensors" for place in range(shards)]
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Words and tensors of a folder."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return json.loads((folder / "config.json").read_text("utf-8")), found


def token_ids(batch: int = 2, length: int = 17, seed: int = 3) -> np.ndarray:
    """(batch, length) int64."""
    return np.random.default_rng(seed).integers(3, DENSE["vocab_size"], (batch, length))
