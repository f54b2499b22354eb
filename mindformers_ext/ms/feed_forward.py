# SPDX-License-Identifier: Apache-2.0
"""The dense SwiGLU feed-forward layer of LLaMA."""

from __future__ import annotations

from mindspore import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class FeedForward(nn.Cell):
    """w2(silu(w1 x) * w3 x). Input and output (T, D); the same outputs as ``MoE`` with no experts to report."""

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        model, dtype = spec.model, mindspore_dtype(spec.numerics.param_dtype)
        hidden, ffn, std = model.hidden_size, model.intermediate_size, model.initializer_range
        shards = Shards(spec)
        self.w1 = Linear(hidden, ffn, std, dtype, shards, "project in")
        self.w2 = Linear(ffn, hidden, std, dtype, shards, "project out")
        self.w3 = Linear(hidden, ffn, std, dtype, shards, "project in")
        self.swiglu = shards.local(operators.build(operators.swiglu), "feed forward")

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.w2(self.swiglu(self.w1(x_TD), self.w3(x_TD)))
