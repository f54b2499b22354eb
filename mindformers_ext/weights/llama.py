# SPDX-License-Identifier: Apache-2.0
"""What LLaMA's tensors are called. Rotary layout is the same on both sides (rotate-half), so nothing is permuted."""

from __future__ import annotations

from mindformers_ext.core.layers import AttentionSpec
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import GroupedQkv, InterleavedRows

_HF, _MS = "model.layers.{layer}.", "model.layers.{layer}."

EMBEDDING = Rule("model.embed_tokens.weight", ("model.tok_embeddings.embedding_weight",), "V D")
ROWS = ("HP", "NP", "NP")  # of q, k and v
ATTENTION = (
    Rule(_HF + "input_layernorm.weight", (_MS + "attention_norm.weight",), "D"),
    Rule(_HF + "self_attn.q_proj.weight", (_MS + "attention.wq.weight",), "HP D"),
    Rule(_HF + "self_attn.k_proj.weight", (_MS + "attention.wk.weight",), "NP D"),
    Rule(_HF + "self_attn.v_proj.weight", (_MS + "attention.wv.weight",), "NP D"),
    Rule(_HF + "self_attn.o_proj.weight", (_MS + "attention.wo.weight",), "D HP"),
    Rule(_HF + "post_attention_layernorm.weight", (_MS + "ffn_norm.weight",), "D"),
)
FEED_FORWARD = (
    Rule(_HF + "mlp.gate_proj.weight", (_MS + "feed_forward.w1.weight",), "F D"),
    Rule(_HF + "mlp.down_proj.weight", (_MS + "feed_forward.w2.weight",), "D F"),
    Rule(_HF + "mlp.up_proj.weight", (_MS + "feed_forward.w3.weight",), "F D"),
)
FEED_FORWARD_CONCAT = (
    Rule(
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        (_MS + "feed_forward.w_gate_hidden.weight",),
        ("F D", "F D"),
        InterleavedRows(),
    ),
    Rule(_HF + "mlp.down_proj.weight", (_MS + "feed_forward.w2.weight",), "D F"),
)
FEED_FORWARD_BIAS = (
    Rule(_HF + "mlp.gate_proj.bias", (_MS + "feed_forward.w1.bias",), "F"),
    Rule(_HF + "mlp.down_proj.bias", (_MS + "feed_forward.w2.bias",), "D"),
    Rule(_HF + "mlp.up_proj.bias", (_MS + "feed_forward.w3.bias",), "F"),
)
FEED_FORWARD_BIAS_CONCAT = (
    Rule(
        (_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias"),
        (_MS + "feed_forward.w_gate_hidden.bias",),
        ("F", "F"),
        InterleavedRows(),
    ),
    FEED_FORWARD_BIAS[1],
)
FINAL_NORM = Rule("model.norm.weight", ("model.norm_out.weight",), "D")
HEAD = Rule("lm_head.weight", ("lm_head.weight",), "V D")

# Tied head: neither side stores it, but files exist that repeat the embedding under the head's name.
TIED_HF = (("lm_head.weight", "model.embed_tokens.weight"),)
TIED_MS = (("lm_head.weight", "model.tok_embeddings.embedding_weight"),)

HF_BUFFERS = ((r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary constants, computed from rope_theta"),)


def attention(spec: AttentionSpec, qkv_concat: bool) -> tuple[Rule, ...]:
    """The attention of one layer: q, k and v apart or in one tensor, with their biases and norms where it has them."""
    before, *projections, out, behind = ATTENTION
    if spec.qkv_bias:
        projections += [
            Rule(_HF + f"self_attn.{name}_proj.bias", (_MS + f"attention.w{name}.bias",), rows)
            for name, rows in zip("qkv", ROWS, strict=True)
        ]
    if qkv_concat:
        projections = [
            Rule(
                tuple(_HF + f"self_attn.{name}_proj.{kind}" for name in "qkv"),
                (_MS + f"attention.w_qkv.{kind}",),
                tuple(rows + width for rows in ROWS),
                GroupedQkv(spec.num_key_value_heads),
            )
            for kind, width in (("weight", " D"), ("bias", ""))
            if kind == "weight" or spec.qkv_bias
        ]
    outputs = [
        out,
        *([Rule(_HF + "self_attn.o_proj.bias", (_MS + "attention.wo.bias",), "D")] if spec.out_bias else []),
    ]
    norms = [
        Rule(_HF + f"self_attn.{name}_norm.weight", (_MS + f"attention.{name}_norm.weight",), "P")
        for name in "qk"
        if spec.qk_norm
    ]
    return before, *projections, *outputs, *norms, behind
