# SPDX-License-Identifier: Apache-2.0
"""What the feed-forward parts of LLaMA-MoE v2 are called: Mixtral's experts, dense layers, and the residual part.

Dense layers stand under the mixture's name. The published converter leaves them LLaMA's names, which the published
network does not find; both are read (spec of LLaMA-MoE v2, section 1).
"""

from __future__ import annotations

from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.weights.mixtral import per_expert
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import InterleavedRows

_LAYER, _MS = "model.layers.{layer}.", "model.layers.{layer}.feed_forward."
_HF, _ALWAYS = _LAYER + "block_sparse_moe.", _LAYER + "mlp_residual."

DENSE = (
    Rule(_HF + "w1.weight", (_MS + "w1.weight",), "F D"),
    Rule(_HF + "w2.weight", (_MS + "w2.weight",), "D F"),
    Rule(_HF + "w3.weight", (_MS + "w3.weight",), "F D"),
)
DENSE_CONCAT = (
    Rule((_HF + "w1.weight", _HF + "w3.weight"), (_MS + "w_gate_hidden.weight",), ("F D", "F D"), InterleavedRows()),
    DENSE[1],
)
RESIDUAL = (
    Rule(_ALWAYS + "w1.weight", (_MS + "shared_experts.w1.weight",), "U D"),
    Rule(_ALWAYS + "w2.weight", (_MS + "shared_experts.w2.weight",), "D U"),
    Rule(_ALWAYS + "w3.weight", (_MS + "shared_experts.w3.weight",), "U D"),
)
LLAMA_DENSE = "per_expert_llama_dense"  # how the published converter spells dense layers
STYLES = dict.fromkeys(("per_expert", LLAMA_DENSE), per_expert())
RESIDUAL_STYLES = dict.fromkeys(STYLES, (*per_expert(_MS + ROUTED), *RESIDUAL))
