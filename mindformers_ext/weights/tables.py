# SPDX-License-Identifier: Apache-2.0
"""The tables of weight names by family. Attention, norms, embedding and head are called as LLaMA's everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindformers_ext.core.families import (
    LLAMA,
    LLAMA_MOE,
    LLAMA_MOE_RESIDUAL,
    LLAMA_MOE_V2,
    LLAMA_MOE_V2_RESIDUAL,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
)
from mindformers_ext.weights import llama, llama_moe, llama_moe_v2, mixtral, qwen2_moe, qwen3_moe
from mindformers_ext.weights.rules import Rule


@dataclass(frozen=True)
class Table:
    """What one family's files call the feed-forward part of a layer.

    ``mixtures``: by spelling, the rules of a layer with experts; the first spelling is the one written by default.
    ``gates``: by the kind of gate, where a family has several, the rules besides; ``weighting``: those of what weighs
    routed and shared experts against each other.
    ``dense``: of a layer without; ``dense_concat`` of the same with gate and up in one tensor (``qkv_concat``); where
    its products have biases (``mlp_bias``), ``dense_bias`` and ``dense_bias_concat`` too. ``dense_of``: both where a
    spelling of the mixtures has others. ``attention_experts``: of a mixture's attention whose heads are experts.
    ``expert_bias``, ``attention_bias``: of experts that have biases, and of heads that are such experts.
    """

    mixtures: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    gates: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    weighting: tuple[Rule, ...] = ()
    dense: tuple[Rule, ...] = llama.FEED_FORWARD
    dense_concat: tuple[Rule, ...] = llama.FEED_FORWARD_CONCAT
    dense_of: Mapping[str, tuple[tuple[Rule, ...], tuple[Rule, ...]]] = field(default_factory=dict)
    attention_experts: tuple[Rule, ...] = ()
    expert_bias: tuple[Rule, ...] = ()
    attention_bias: tuple[Rule, ...] = ()
    dense_bias: tuple[Rule, ...] = llama.FEED_FORWARD_BIAS
    dense_bias_concat: tuple[Rule, ...] = llama.FEED_FORWARD_BIAS_CONCAT


_V2_DENSE: dict[str, Any] = {
    "dense": llama_moe_v2.DENSE,
    "dense_concat": llama_moe_v2.DENSE_CONCAT,
    "attention_experts": llama_moe_v2.ATTENTION_EXPERTS,
    "attention_bias": llama_moe_v2.ATTENTION_BIAS,
    "dense_of": {llama_moe_v2.LLAMA_DENSE: (llama.FEED_FORWARD, llama.FEED_FORWARD_CONCAT)},
}
TABLES: dict[str, Table] = {
    LLAMA.name: Table(),
    MISTRAL.name: Table(),
    QWEN2.name: Table(),
    QWEN3.name: Table(),
    MIXTRAL.name: Table(mixtral.STYLES),
    QWEN2_MOE.name: Table(qwen2_moe.STYLES),
    QWEN3_MOE.name: Table(qwen3_moe.STYLES),
    LLAMA_MOE.name: Table(llama_moe.STYLES, llama_moe.GATES),
    LLAMA_MOE_RESIDUAL.name: Table(llama_moe.RESIDUAL_STYLES, llama_moe.RESIDUAL_GATES, llama_moe.WEIGHTING),
    LLAMA_MOE_V2.name: Table(llama_moe_v2.STYLES, expert_bias=llama_moe_v2.EXPERT_BIAS, **_V2_DENSE),
    LLAMA_MOE_V2_RESIDUAL.name: Table(
        llama_moe_v2.RESIDUAL_STYLES, expert_bias=llama_moe_v2.RESIDUAL_BIAS, **_V2_DENSE
    ),
}


def register_table(family: str, table: Table) -> None:
    """Add the table of a family of ``core.families``; ``ValueError`` where it has one."""
    if family in TABLES:
        raise ValueError(f"family '{family}' has a table already")
    TABLES[family] = table
