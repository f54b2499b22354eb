# SPDX-License-Identifier: Apache-2.0
"""The YAML keys that name an element type, written as MindFormers knows them: bfloat16, not bf16."""

from __future__ import annotations

from typing import Any

from mindformers_ext.core.config.keys import KEYS, MODEL
from mindformers_ext.core.layers import dtype_name

PLACES: tuple[tuple[str, str], ...] = (
    *((key.section, key.name) for key in KEYS if key.kind == "dtype"),
    (MODEL, "residual_dtype"),
    (MODEL, "embedding_init_type"),
)
NESTED = (MODEL,)  # sections that may hold moe_config as well


def name_dtypes(config: dict[str, Any]) -> None:
    """Replace, in place, every other word for a type by its name; what is no type at all stays for the checks."""
    for section, key in PLACES:
        for path in (section, *(f"{outer}.{section}" for outer in NESTED)):
            found: Any = config
            for step in path.split("."):
                found = found.get(step) if isinstance(found, dict) else None
            if isinstance(found, dict) and isinstance(found.get(key), str):
                found[key] = dtype_name(found[key]) or found[key]
