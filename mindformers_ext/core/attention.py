# SPDX-License-Identifier: Apache-2.0
"""What the attention of one layer of a model is, also where its heads are experts."""

from __future__ import annotations

import math
from typing import Any

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.layers import AttentionSpec, MoESpec


def attention_of(model: Any, index: int) -> AttentionSpec:
    """The attention of layer ``index`` of a ``ModelSpec``."""
    is_mixture = model.moe is not None and index not in model.dense_layers
    routing = attention_experts(model) if model.attn_experts and is_mixture else None
    return AttentionSpec(
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=routing.num_local_experts if routing else model.num_key_value_heads,
        head_dim=model.head_dim,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        out_bias=model.out_bias,
        window=None if index in model.full_attention_layers else model.sliding_window,
        experts=routing,
    )


def attention_experts(model: Any) -> MoESpec:
    """How tokens are routed to groups of heads of a ``ModelSpec`` that has a mixture (LLaMA-MoE v2, arXiv:2411.15708):
    each passes ``top_k_attn`` of them, whose outputs are weighed like experts' and multiplied by ``scale_factor_attn``.
    The loss that balances them weighs as that of the mixture."""
    moe, chosen = model.moe, model.top_k_attn
    factor = dict(moe.aux_losses).get("expert", 0.0) / moe.num_experts_per_tok * chosen
    return MoESpec(
        num_local_experts=model.attn_experts,
        num_experts_per_tok=chosen,
        norm_single_choice=True,
        routed_scaling_factor=model.scale_factor_attn,
        capacity_factor=0.0,
        aux_losses=(("expert", factor),) if factor else (),
        aux_loss_reduce=moe.aux_loss_reduce,
        router_dtype=moe.router_dtype,
        expert_bias=moe.expert_bias,
        aux_loss_type=moe.aux_loss_type,
    )


def collect_attention_experts(model: Any, problems: Problems) -> None:
    """Add every broken rule of a model's (``ModelSpec``) attention experts."""
    heads, groups, count = model.num_attention_heads, model.num_key_value_heads, model.attn_experts
    chosen, bias = model.top_k_attn, model.qkv_bias or model.out_bias
    if count < 1 or count % max(groups, 1) or heads % max(count, 1):
        wanted = f"give {groups}, or a multiple of it that divides {heads}"
        problems.add(f"attn_experts={count} of {groups} key/value heads and {heads} query heads", wanted)
    if not 1 <= chosen <= max(count, 1):
        problems.add(f"top_k_attn={chosen} of {count} experts", f"choose 1 to {max(count, 1)}")
    if not 0 < model.scale_factor_attn < math.inf:
        problems.add(f"scale_factor_attn={model.scale_factor_attn}", "give a number above 0")
    if model.sliding_window is not None:
        problems.add(f"sliding_window={model.sliding_window} with attn_experts", "set it to null: it is not built")
    if bias or model.qk_norm:
        problems.add("attn_experts with biases or norms of heads", "attention experts have none")
