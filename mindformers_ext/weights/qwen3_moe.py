# SPDX-License-Identifier: Apache-2.0
"""What Qwen3-MoE's router and experts are called: LLaMA's three matrices per expert, below ``mlp.``.

transformers 5 holds the experts of a layer fused, with gate above up (E, 2M, D), under the same ``mlp.experts``.
"""

from __future__ import annotations

from mindformers_ext.weights.mixtral import fused
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import Stack

_HF, _MS = "model.layers.{layer}.mlp.", "model.layers.{layer}.feed_forward."


def mixture(routed: str = "") -> dict[str, tuple[Rule, ...]]:
    """Router and experts by spelling; ``routed``: what stands before them on MindSpore's side."""
    start, expert = _MS + routed, _HF + "experts.{expert}."
    per_expert = (
        Rule(_HF + "gate.weight", (start + "router.dense.weight",), "E D"),
        Rule(expert + "gate_proj.weight", (start + "ffn.w1.weight",), "M D", Stack()),
        Rule(expert + "down_proj.weight", (start + "ffn.w2.weight",), "D M", Stack()),
        Rule(expert + "up_proj.weight", (start + "ffn.w3.weight",), "M D", Stack()),
    )
    return {"per_expert": per_expert, "fused": fused(_HF, start)}


STYLES = mixture()
