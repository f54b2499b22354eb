# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with rotary embedding."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class Linear(nn.Cell):
    """x W^T without bias. Input (T, in), output (T, out), weight (out, in). ``row``: its strategy on many devices."""

    def __init__(
        self, width_in: int, width_out: int, std: float, param_dtype: ms.Type, shards: Shards, row: str
    ) -> None:
        super().__init__()
        weight = initializer(Normal(sigma=std), (width_out, width_in), param_dtype)
        self.weight = Parameter(weight, name="weight")
        self.product = shards.shard(P.MatMul(transpose_b=True), row)

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.product(x_TD, ops.cast(self.weight, x_TD.dtype))


def rotary_tables(positions: int, head_dim: int, theta: float, dtype: ms.Type) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, 1, P), both halves equal (Su et al. 2021, equation 34, in rotate-half layout)."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = np.arange(positions, dtype=np.float32)[:, None] * frequency[None]
    angle = np.concatenate([angle, angle], -1)[None, :, None]
    return Tensor(np.cos(angle), dtype), Tensor(np.sin(angle), dtype)


class Attention(nn.Cell):
    """Causal self-attention. Input (B*S, D) and the rotary tables (1, S, 1, P); output (B*S, D)."""

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        model = spec.model
        self.heads, self.kv_heads, self.head_dim = (
            model.num_attention_heads,
            model.num_key_value_heads,
            model.head_dim,
        )
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        std, dtype = model.initializer_range, mindspore_dtype(spec.numerics.param_dtype)
        shards = Shards(spec)
        self.wq = Linear(model.hidden_size, width, std, dtype, shards, "project in")
        self.wk = Linear(model.hidden_size, kv_width, std, dtype, shards, "project in")
        self.wv = Linear(model.hidden_size, kv_width, std, dtype, shards, "project in")
        self.wo = Linear(width, model.hidden_size, std, dtype, shards, "project out")
        rotary = operators.build(operators.rotary, operators.dtype(spec.numerics.rotary_dtype))
        self.rotary = shards.local(rotary, "rotary")
        softmax_dtype = operators.dtype(spec.numerics.softmax_dtype)
        attend = operators.build(
            operators.causal_attention,
            self.heads // shards.mp,
            self.kv_heads // shards.mp,
            self.head_dim,
            spec.seq_length,
            softmax_dtype,
        )
        self.attend = shards.local(attend, "attend")

    def construct(self, x_TD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        S = cos_SP.shape[1]
        q = self.rotary(ops.reshape(self.wq(x_TD), (-1, S, self.heads, self.head_dim)), cos_SP, sin_SP)
        k = self.rotary(ops.reshape(self.wk(x_TD), (-1, S, self.kv_heads, self.head_dim)), cos_SP, sin_SP)
        v = ops.reshape(self.wv(x_TD), (-1, S, self.kv_heads * self.head_dim))
        mixed = self.attend(
            ops.reshape(q, (-1, S, self.heads * self.head_dim)),
            ops.reshape(k, (-1, S, self.kv_heads * self.head_dim)),
            v,
        )
        return self.wo(ops.reshape(mixed, (-1, self.heads * self.head_dim)))
