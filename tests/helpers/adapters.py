# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in PEFT's files, and what a model with one is, computed once more in numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."
LAYERS = ("q_proj", "v_proj", "o_proj", "down_proj")


def make_adapter(
    folder: Path, base: Mapping[str, np.ndarray], rank: int = 4, layers: tuple[str, ...] = LAYERS, **config: Any
) -> dict[str, np.ndarray]:
    """An adapter for every matrix of ``base`` whose name holds one of ``layers``; returns what its file holds."""
    random = np.random.default_rng(rank)
    tensors = {}
    for name, weight in base.items():
        if weight.ndim == 2 and any(f".{layer}." in name for layer in layers):
            stem = PREFIX + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = random.standard_normal((rank, weight.shape[1])).astype(np.float32) * 0.1
            tensors[f"{stem}.lora_B.weight"] = random.standard_normal((weight.shape[0], rank)).astype(np.float32) * 0.1
    return write_adapter(folder, tensors, rank, layers, **config)


def write_adapter(
    folder: Path, tensors: dict[str, np.ndarray], rank: int, layers: tuple[str, ...] = LAYERS, **config: Any
) -> dict[str, np.ndarray]:
    """The files of PEFT's ``save_pretrained``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    words = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(words | config))
    return tensors


def merged(base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """W + scale B A in float64 for every adapted matrix."""
    result = {name: array.astype(np.float64) for name, array in base.items()}
    for name, low in adapter.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            high = adapter[f"{stem}.lora_B.weight"].astype(np.float64)
            result[stem.removeprefix(PREFIX) + ".weight"] += scale * (high @ low.astype(np.float64))
    return result
