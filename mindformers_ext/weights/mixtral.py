# SPDX-License-Identifier: Apache-2.0
"""What Mixtral's router and experts are called; everything else is LLaMA's.

Hugging Face has spelled the experts in two ways: one matrix per expert (w1 gate, w3 up, w2 down; every published
checkpoint), or fused over experts with gate above up (E, 2M, D), under ``mlp.`` or the older
``block_sparse_moe.``.
"""

from __future__ import annotations

from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import SplitHalves, Stack

_MS = "model.layers.{layer}.feed_forward."
_OLD, _NEW = "model.layers.{layer}.block_sparse_moe.", "model.layers.{layer}.mlp."


def fused(prefix: str, start: str = _MS) -> tuple[Rule, ...]:
    """Router and experts fused over experts; ``start``: what stands before them on MindSpore's side."""
    return (
        Rule(prefix + "gate.weight", (start + "router.dense.weight",), "E D"),
        Rule(
            prefix + "experts.gate_up_proj",
            (start + "ffn.w1.weight", start + "ffn.w3.weight"),
            "E 2M D",
            SplitHalves(),
        ),
        Rule(prefix + "experts.down_proj", (start + "ffn.w2.weight",), "E D M"),
    )


def per_expert(start: str = _MS) -> tuple[Rule, ...]:
    """Router and experts, a matrix each; ``start``: what stands before them on MindSpore's side."""
    return (
        Rule(_OLD + "gate.weight", (start + "router.dense.weight",), "E D"),
        Rule(_OLD + "experts.{expert}.w1.weight", (start + "ffn.w1.weight",), "M D", Stack()),
        Rule(_OLD + "experts.{expert}.w2.weight", (start + "ffn.w2.weight",), "D M", Stack()),
        Rule(_OLD + "experts.{expert}.w3.weight", (start + "ffn.w3.weight",), "M D", Stack()),
    )


PER_EXPERT = per_expert()
STYLES = {"per_expert": PER_EXPERT, "fused": fused(_NEW), "fused_block_sparse": fused(_OLD)}
