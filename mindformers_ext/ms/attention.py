# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with rotary embedding."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.layers import AttentionSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.norm import HeadNorm
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards

BIAS_ROWS = {"project in": "bias", "project out": "whole bias"}  # of a product's strategy: that of adding its bias


class Linear(nn.Cell):
    """x W^T, plus a bias where asked. Input (T, in), output (T, out), weight (out, in), bias (out).

    ``row``: the product's strategy on many devices; with a bias "project in" or "project out".
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        std: float,
        param_dtype: ms.Type,
        shards: Shards,
        row: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        weight = initializer(Normal(sigma=std), (width_out, width_in), param_dtype)
        self.weight = Parameter(weight, name="weight")
        self.product = shards.shard(P.MatMul(transpose_b=True), row)
        self.has_bias = bias
        if bias:
            self.bias = Parameter(initializer("zeros", (width_out,), param_dtype), name="bias")
            self.add = shards.shard(P.BiasAdd(), BIAS_ROWS[row])

    def construct(self, x_TD: Tensor) -> Tensor:
        y_TD = self.product(x_TD, ops.cast(self.weight, x_TD.dtype))
        if self.has_bias:
            return self.add(y_TD, ops.cast(self.bias, x_TD.dtype))
        return y_TD


def rotary_tables(tables: tuple[np.ndarray, np.ndarray], dtype: ms.Type) -> tuple[Tensor, Tensor]:
    """The cosines and sines (S, P) of ``core.rope`` as (1, S, 1, P)."""
    cos, sin = (Tensor(table[None, :, None], dtype) for table in tables)
    return cos, sin


class Attention(nn.Cell):
    """Causal self-attention. Input (B*S, D) and the rotary tables (1, S, 1, P); output (B*S, D). Of packed rows also
    their documents (B, S), with tables (B, S, 1, P)."""

    def __init__(self, spec: NetworkSpec, attention: AttentionSpec, operators: Operators) -> None:
        super().__init__()
        self.heads, self.kv_heads = attention.num_attention_heads, attention.num_key_value_heads
        self.head_dim, self.qk_norm = attention.head_dim, attention.qk_norm
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, std = spec.model.hidden_size, spec.model.initializer_range
        dtype, bias, shards = mindspore_dtype(spec.numerics.param_dtype), attention.qkv_bias, Shards(spec)
        self.wq = Linear(hidden, width, std, dtype, shards, "project in", bias)
        self.wk = Linear(hidden, kv_width, std, dtype, shards, "project in", bias)
        self.wv = Linear(hidden, kv_width, std, dtype, shards, "project in", bias)
        self.wo = Linear(width, hidden, std, dtype, shards, "project out", attention.out_bias)
        if self.qk_norm:
            self.q_norm = HeadNorm(spec, self.head_dim, operators)
            self.k_norm = HeadNorm(spec, self.head_dim, operators)
        rotary = operators.build(operators.rotary, operators.dtype(spec.numerics.rotary_dtype))
        self.rotary = shards.local(rotary, "rotary")
        self.packed_rotary = shards.local(rotary, "rotary documents")
        self.softmax_dtype = operators.dtype(spec.numerics.softmax_dtype)
        self.window = attention.window
        heads, kv_heads = self.heads // shards.mp, self.kv_heads // shards.mp
        sizes = heads, kv_heads, self.head_dim, spec.seq_length, self.softmax_dtype, self.window
        self.attend = shards.local(operators.build(operators.causal_attention, *sizes), "attend")
        if spec.packed:
            self.attend_packed = shards.local(operators.build(operators.packed_attention, *sizes), "attend documents")

    def query(self, x_TD: Tensor, length: int) -> Tensor:
        """(B, S, H, P) of rows of ``length`` S tokens, not yet turned."""
        q_BSHP = ops.reshape(self.wq(x_TD), (-1, length, self.heads, self.head_dim))
        return self.q_norm(q_BSHP) if self.qk_norm else q_BSHP

    def key(self, x_TD: Tensor, length: int) -> Tensor:
        """(B, S, N, P), as ``query``."""
        k_BSNP = ops.reshape(self.wk(x_TD), (-1, length, self.kv_heads, self.head_dim))
        return self.k_norm(k_BSNP) if self.qk_norm else k_BSNP

    def construct(self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        return self.wo(self.context(x_TD, cos, sin, documents_BS))

    def context(self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """What enters the output projection, (B*S, H P)."""
        S = cos.shape[1]
        if documents_BS is None:
            q, k = self.rotary(self.query(x_TD, S), cos, sin), self.rotary(self.key(x_TD, S), cos, sin)
        else:
            q = self.packed_rotary(self.query(x_TD, S), cos, sin)
            k = self.packed_rotary(self.key(x_TD, S), cos, sin)
        q = ops.reshape(q, (-1, S, self.heads * self.head_dim))
        k = ops.reshape(k, (-1, S, self.kv_heads * self.head_dim))
        v = ops.reshape(self.wv(x_TD), (-1, S, self.kv_heads * self.head_dim))
        mixed = self.attend(q, k, v) if documents_BS is None else self.attend_packed(q, k, v, documents_BS)
        return ops.reshape(mixed, (-1, self.heads * self.head_dim))
