# SPDX-License-Identifier: Apache-2.0
"""Dense LLaMA."""

from __future__ import annotations

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.causal_lm import CausalLM


def build_llama(spec: NetworkSpec) -> CausalLM:
    """A LLaMA with ``feed_forward.w1/w2/w3``; ``ValueError`` when the spec has experts."""
    if spec.model.moe is not None:
        raise ValueError("a LLaMA has no experts: remove moe_config or build 'mixtral'")
    return CausalLM(spec)
