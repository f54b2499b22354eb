# SPDX-License-Identifier: Apache-2.0
"""What Qwen2-MoE's feed-forward is called: Qwen3-MoE's router and experts, and a shared expert with its gate."""

from __future__ import annotations

from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.weights.qwen3_moe import mixture
from mindformers_ext.weights.rules import Rule

_HF, _MS = "model.layers.{layer}.mlp.shared_expert", "model.layers.{layer}.feed_forward.shared_experts"

SHARED = (
    Rule(_HF + ".gate_proj.weight", (_MS + ".w1.weight",), "U D"),
    Rule(_HF + ".down_proj.weight", (_MS + ".w2.weight",), "D U"),
    Rule(_HF + ".up_proj.weight", (_MS + ".w3.weight",), "U D"),
    Rule(_HF + "_gate.weight", (_MS + "_gate.weight",), "1 D"),
)
STYLES = {style: (*rules, *SHARED) for style, rules in mixture(ROUTED).items()}
