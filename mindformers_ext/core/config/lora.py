# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685): the YAML's ``pet_config``, and the names of what is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems, UserError

# Behind the name of the adapted layer, as MindFormers names them: A (rank, in), B (out, rank).
LORA_A, LORA_B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"
DROPOUT_SEED = "model.adapter_dropout_seed"  # a number per adapted layer, set before each step; in no checkpoint
BESIDE_BASE = (LORA_A, LORA_B, DROPOUT_SEED)  # endings of what base weights lack
ADAPTER_CONFIG = "adapter_config.json"  # beside the checkpoint folder, with PEFT's words
WHERE = "model.model_config.pet_config"

# Keys that would change the result and are not built, with the values that mean off.
UNBUILT: dict[str, tuple[object, ...]] = {
    "lora_a_init": ("normal", None),
    "lora_b_init": ("zero", "zeros", None),
    "compute_dtype": (None,),
    "param_init_type": (None,),
    "freeze_include": (None, []),
    "freeze_exclude": (None, []),
}
READ = ("pet_type", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "exclude_layers")


@dataclass(frozen=True)
class LoraSpec:
    """y = W x + alpha / rank * B A dropout(x) for every layer whose name matches ``targets`` and not ``exclude``."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.01
    targets: str = ""
    exclude: str | None = None

    @property
    def scale(self) -> float:
        """The factor of the adapters' product."""
        return self.alpha / self.rank

    def wants(self, layer: str) -> bool:
        """Whether the layer of this name gets an adapter."""
        return bool(re.match(self.targets, layer)) and not (self.exclude and re.match(self.exclude, layer))

    def peft_words(self, base: str | None = None) -> dict[str, Any]:
        """The description in the words of Hugging Face's PEFT; ``base``: the weights below the adapters."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "exclude_modules": self.exclude,
            "bias": "none",
            "base_model_name_or_path": base,
        }


def lora_from_yaml(config: Mapping[str, Any]) -> LoraSpec | None:
    """The adapters that a configuration asks for, None without ``pet_config``.

    Raises:
        UserError: lists unknown keys, values out of range and options that are not built.
    """
    words = (config.get("model") or {}).get("model_config") or {}
    given = words.get("pet_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{WHERE}={given!r} is no section: write keys below it, such as target_modules")
    problems = Problems(WHERE)
    problems.unknown_keys(WHERE, given, (*READ, *UNBUILT))
    problems.one_of("pet_type", given.get("pet_type"), ("lora",))
    for name, off in UNBUILT.items():
        if name in given and given[name] not in off:
            problems.add(f"{name}={given[name]!r} is not built", "leave it out")
    rank = read_value(f"{WHERE}.lora_rank", given.get("lora_rank", 8), "int", 8, problems)
    alpha = read_value(f"{WHERE}.lora_alpha", given.get("lora_alpha", 16), "int", 16, problems)
    dropout = read_value(f"{WHERE}.lora_dropout", given.get("lora_dropout", 0.01), "float", 0.01, problems)
    problems.positive("lora_rank", rank)
    problems.positive("lora_alpha", alpha)
    if isinstance(dropout, float) and not 0.0 <= dropout < 1.0:
        problems.add(f"lora_dropout={dropout} is out of range", "use 0 up to below 1")
    targets, exclude = given.get("target_modules"), given.get("exclude_layers")
    for name, text in (("target_modules", targets), ("exclude_layers", exclude)):
        fault = _fault(text) if text is not None or name == "target_modules" else None
        if fault:
            problems.add(
                f"{name}={text!r} {fault}", "write a regular expression over layer names, such as '.*wq|.*wk|.*wv|.*wo'"
            )
    problems.raise_if_any()
    return LoraSpec(rank, alpha, dropout, str(targets), exclude)


def _fault(text: object) -> str | None:
    if not isinstance(text, str) or not text:
        return "is no text"
    try:
        re.compile(text)
    except re.error as error:
        return f"is no regular expression ({error})"
    return None
