# SPDX-License-Identifier: Apache-2.0
"""What the feed-forward parts of LLaMA-MoE v2 are called: Mixtral's experts, dense layers, and the residual part.

Dense layers stand under the mixture's name. The published converter leaves them LLaMA's names, which the published
network does not find; both are read (spec of LLaMA-MoE v2, section 1).
"""

from __future__ import annotations

from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.weights.mixtral import per_expert
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import Concatenated, InterleavedRows, Stack

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
_ATTENTION, _MIXED = _LAYER + "self_attn.", "model.layers.{layer}.attention."
ATTENTION_EXPERTS = (
    Rule(_ATTENTION + "gate.weight", (_MIXED + "router.dense.weight",), "A D"),
    Rule(_ATTENTION + "q_proj.{group}.weight", (_MIXED + "wq.weight",), "QP D", Concatenated(0)),
    Rule(_ATTENTION + "k_proj.{group}.weight", (_MIXED + "wk.weight",), "P D", Concatenated(0)),
    Rule(_ATTENTION + "v_proj.{group}.weight", (_MIXED + "wv.weight",), "P D", Concatenated(0)),
    Rule(_ATTENTION + "o_proj.{group}.weight", (_MIXED + "wo.weight",), "D QP", Concatenated(1)),
)
# of an aligned model (add_rescale_bias)
EXPERT_BIAS = (Rule(_HF + "experts.{expert}.w2.bias", (_MS + "ffn.w2.bias",), "D", Stack()),)
RESIDUAL_BIAS = (Rule(_HF + "experts.{expert}.w2.bias", (_MS + ROUTED + "ffn.w2.bias",), "D", Stack()),)
ATTENTION_BIAS = (Rule(_ATTENTION + "o_proj.{group}.bias", (_MIXED + "expert_bias",), "D", Stack()),)
LLAMA_DENSE = "per_expert_llama_dense"  # how the published converter spells dense layers
STYLES = dict.fromkeys(("per_expert", LLAMA_DENSE), per_expert())
RESIDUAL_STYLES = dict.fromkeys(STYLES, (*per_expert(_MS + ROUTED), *RESIDUAL))
