# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights, operations and bytes can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import KernelSpec, ModelSpec, NetworkSpec, NumericsSpec

DENSE = NetworkSpec(
    model=ModelSpec(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    ),
    seq_length=4,
    numerics=NumericsSpec(compute_dtype="bfloat16", param_dtype="float32"),
    kernels=KernelSpec(flash_attention=True),
)
MOE = replace(DENSE, model=replace(DENSE.model, moe=MoESpec(num_local_experts=4, num_experts_per_tok=2)))
