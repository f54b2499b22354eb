# SPDX-License-Identifier: Apache-2.0
"""Mixtral: LLaMA whose feed-forward layers are routed experts."""

from __future__ import annotations

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM


def build_mixtral(spec: NetworkSpec) -> CausalLM:
    """A Mixtral with ``feed_forward.router`` and ``feed_forward.ffn``; ``ValueError`` without experts."""
    if spec.model.moe is None:
        raise ValueError("a Mixtral needs moe_config with expert_num above 1")
    return CausalLM(spec)
