# SPDX-License-Identifier: Apache-2.0
"""Quantised networks, which a YAML asks for in several words: refused by one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.keys import MODEL, UNBUILT
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems

QUANTISED = ("quant", "quant_config", "quantization", "quantization_config")
ADVICE = (
    "weights of 8 or 4 bits are neither read, converted nor computed with here: leave the key out and give the model's "
    "weights in 16 or 32 bits, or run the file with MindFormers itself and MindSpore Golden Stick"
)


def check_not_quantised(config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose network is quantised.

    Raises:
        UserError: names every key that asks for it.
    """
    problems, words = Problems("the configuration"), section_at(config, MODEL)
    for name in QUANTISED:
        if words.get(name) not in (None, *UNBUILT[MODEL][name]):
            problems.add(f"{MODEL}.{name} asks for a quantised network", ADVICE)
    problems.raise_if_any()
