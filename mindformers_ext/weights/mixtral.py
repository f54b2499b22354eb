# SPDX-License-Identifier: Apache-2.0
"""What Mixtral's router and experts are called; everything else is LLaMA's.

Hugging Face has spelled the experts in two ways: one matrix per expert (w1 gate, w3 up, w2 down; every published
checkpoint), or fused over experts with gate above up (E, 2F, D), under ``mlp.`` or the older
``block_sparse_moe.``.
"""

from __future__ import annotations

from dataclasses import replace

from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import SplitHalves, Stack, Transposed

_MS = "model.layers.{layer}.feed_forward."
_OLD, _NEW = "model.layers.{layer}.block_sparse_moe.", "model.layers.{layer}.mlp."
_ROUTER = _MS + "router.dense.weight"
_W1, _W2, _W3 = (_MS + f"ffn.{name}.weight" for name in ("w1", "w2", "w3"))


def _fused(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(prefix + "gate.weight", (_ROUTER,), "E D"),
        Rule(prefix + "experts.gate_up_proj", (_W1, _W3), "E 2F D", SplitHalves()),
        Rule(prefix + "experts.down_proj", (_W2,), "E D F"),
    )


PER_EXPERT = (
    Rule(_OLD + "gate.weight", (_ROUTER,), "E D"),
    Rule(_OLD + "experts.{expert}.w1.weight", (_W1,), "F D", Stack()),
    Rule(_OLD + "experts.{expert}.w2.weight", (_W2,), "D F", Stack()),
    Rule(_OLD + "experts.{expert}.w3.weight", (_W3,), "F D", Stack()),
)
STYLES = {"per_expert": PER_EXPERT, "fused": _fused(_NEW), "fused_block_sparse": _fused(_OLD)}

# Kept by training, not by Hugging Face's model.
MS_STATE = (
    (r"model\.layers\.\d+\.feed_forward\.router\.router\.topk_bias", "router bias, unknown to Hugging Face"),
    (r"model\.layers\.\d+\.feed_forward\.router\.router\.(expert_load|fi_parameter)", "router statistics"),
)


def feed_forward(style: str, transposed: bool) -> tuple[Rule, ...]:
    """Router and experts in the HF spelling ``style``; ``transposed`` is the GMM layout: (E, D, F), (E, F, D)."""
    router, *experts = STYLES[style]
    if not transposed:
        return (router, *experts)
    return (router, *(replace(rule, transform=Transposed(rule.transform)) for rule in experts))
