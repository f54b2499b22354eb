# SPDX-License-Identifier: Apache-2.0
"""Small model folders to merge, made without a framework: llama, mistral, qwen2, phi3 and mixtral of a few layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mindformers_ext.formats.safetensors_dir import SafetensorsDir, SafetensorsDirWriter
from mindformers_ext.formats.tensors import MappingReader

BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "granite": "GraniteForCausalLM",
}
TYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BF16}


def config_of(
    kind: str = "llama", layers: int = 4, hidden: int = 32, ffn: int = 48, vocab: int = 80, **more: Any
) -> dict:
    """A config.json as transformers 4 writes it."""
    result = {
        "architectures": [KINDS[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if kind == "mixtral":
        result |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    if kind == "mistral":
        result["sliding_window"] = None
    if kind == "qwen3":
        result["head_dim"] = 16  # wider together than hidden_size, as in the small ones of the family
    if kind == "gemma2":
        result |= {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16}
        result |= {"sliding_window": 8, "tie_word_embeddings": True}
    if kind == "granite":
        result |= {"embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.2}
        result |= {"logits_scaling": 8.0}
    return result | more


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of the model."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (d,)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        shapes[layer + "self_attn.o_proj.weight"] = (d, q)
        if config["model_type"] == "qwen3":
            shapes |= {layer + f"self_attn.{name}_norm.weight": (width,) for name in "qk"}
        if config["model_type"] == "gemma2":
            shapes |= {layer + f"{name}_feedforward_layernorm.weight": (d,) for name in ("pre", "post")}
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (d,)
        if config["model_type"] == "phi3":
            shapes[layer + "self_attn.qkv_proj.weight"] = (q + 2 * kv, d)
            shapes[layer + "mlp.gate_up_proj.weight"] = (2 * f, d)
            shapes[layer + "mlp.down_proj.weight"] = (d, f)
            continue
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (rows, d)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[layer + f"self_attn.{name}_proj.bias"] = (rows,)
        if config["model_type"] == "mixtral":
            moe = layer + "block_sparse_moe."
            shapes[moe + "gate.weight"] = (config["num_local_experts"], d)
            for e in range(config["num_local_experts"]):
                shapes |= {
                    moe + f"experts.{e}.{w}.weight": s for w, s in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d)))
                }
        else:
            shapes |= {
                layer + "mlp.gate_proj.weight": (f, d),
                layer + "mlp.up_proj.weight": (f, d),
                layer + "mlp.down_proj.weight": (d, f),
            }
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def write_model(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shard: int = 10**9) -> Path:
    """A model folder with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = MappingReader(tensors)
    with SafetensorsDirWriter(folder, list(reader.infos.values()), shard) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1}')
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(config["vocab_size"])))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return folder


def tokenizer_json(vocab: int) -> dict:
    """A word-level tokenizer: three special tokens and words w3, w4, ..."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    special = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, i in list(words.items())[:3]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }


def make_model(
    folder: Path,
    kind: str = "llama",
    seed: int = 0,
    near: Path | None = None,
    spread: float = 0.02,
    dtype: str = "bfloat16",
    shard: int = 10**9,
    **config: Any,
) -> Path:
    """A model of random weights, or ``near`` another one plus noise of ``spread`` (a fine-tuned model)."""
    settings = config_of(kind, **{"torch_dtype": dtype, **config})
    random = np.random.default_rng(seed)
    base = tensors_of(near) if near else {}
    tensors = {}
    for name, shape in shapes_of(settings).items():
        start = base[name].astype(np.float32) if name in base else np.float32(1.0 if len(shape) == 1 else 0.0)
        noise = random.standard_normal(shape, dtype=np.float32) * (spread if near or len(shape) == 1 else 0.05)
        tensors[name] = (start + noise).astype(TYPES[dtype])
    return write_model(folder, tensors, settings, shard)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    reader = SafetensorsDir(folder)
    result = {name: reader.read(name) for name in reader.infos}
    reader.close()
    return result


def family(folder: Path, count: int = 2, **words: Any) -> list[Path]:
    """A base and ``count`` models fine-tuned from it: base, ft1, ft2, ..."""
    base = make_model(folder / "base", **words)
    return [base, *(make_model(folder / f"ft{n}", seed=n, near=base, **words) for n in range(1, count + 1))]
