# SPDX-License-Identifier: Apache-2.0
"""The code that a LLaMA-MoE folder carries, so that transformers loads it with ``trust_remote_code=True``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ext.formats.atomic import write_text

SAVED = Path(__file__).parent / "saved"
MODELS = {
    "AutoModel": "LlamaMoEModel",
    "AutoModelForCausalLM": "LlamaMoEForCausalLM",
    "AutoModelForSequenceClassification": "LlamaMoEForSequenceClassification",
}


def auto_map() -> dict[str, str]:
    """The entry of ``config.json`` by which transformers finds the classes."""
    models = {auto: f"modeling_llama_moe.{name}" for auto, name in MODELS.items()}
    return {"AutoConfig": "configuration_llama_moe.LlamaMoEConfig", **models}


def code_files() -> dict[str, str]:
    """File name -> text of every file that a model's folder carries."""
    return {path.name: path.read_text("utf-8") for path in sorted(SAVED.glob("*_llama_moe.py"))}


def save_code(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the code into a folder that exists, and return ``config`` with the entries that lead to it.

    ``architectures`` stays where it names one of the classes, and is the causal model's otherwise.
    """
    for name, text in code_files().items():
        write_text(folder / name, text)
    given = list(config.get("architectures") or ())
    named = given if given and set(given) <= set(MODELS.values()) else [MODELS["AutoModelForCausalLM"]]
    return {**config, "architectures": named, "auto_map": auto_map()}
