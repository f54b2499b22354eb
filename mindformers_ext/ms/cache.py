# SPDX-License-Identifier: Apache-2.0
"""Attention over a key and value cache of fixed size, updated in place.

A cache holds M positions for each of B rows and N heads of keys and values; query heads that share one are stacked, so
nothing is repeated in memory. Rows are filled from position 0 on, each with its own length: there is no padding on the
left, a position is a place, and what lies behind a row's length is never seen. A layer with a window W below M holds W
places and rolls: position p stands at p mod W, where the token that leaves the window stood.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Attention
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators


class LayerCache(nn.Cell):
    """Keys and values of one layer, (B*N*M, P) each, or (B*N*W, P) where it ``rolls``. Holds no computation."""

    def __init__(self, layer: int, rows: int, positions: int, spec: NetworkSpec) -> None:
        super().__init__(auto_prefix=False)
        attention, dtype = spec.model.layer(layer).attention, mindspore_dtype(spec.numerics.compute_dtype)
        self.positions = min(attention.window or positions, positions)
        self.rolls = self.positions < positions
        shape = (rows * attention.num_key_value_heads * self.positions, attention.head_dim)
        self.key = Parameter(ops.zeros(shape, dtype), name=f"cache.{layer}.key", requires_grad=False)
        wide = (shape[0], shape[1] + (attention.experts is not None))  # see PromptExpertAttention
        self.value = Parameter(ops.zeros(wide, dtype), name=f"cache.{layer}.value", requires_grad=False)


class PromptAttention(nn.Cell):
    """``attention`` on whole prompts; keys and values go into ``cache`` too.

    Inputs: x (B*S, D), cos and sin (1, S, 1, P) or (B, S, 1, P), and int32 the cache rows to write: (B*N*S); of a cache
    that rolls (B*N*W), with as many rows of (B*N*S) that go there, ``sources``. Output (B*S, D). Rows shorter than S
    are padded on the right, where causality hides the padding from every real token.
    """

    def __init__(self, attention: Attention, cache: LayerCache, shape: tuple[int, int], operators: Operators) -> None:
        super().__init__(auto_prefix=False)
        self.attention, self.cache = attention, cache
        self.rows, self.length = shape
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.attend = operators.build(
            operators.causal_attention,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.length,
            attention.softmax_dtype,
            attention.window,
        )
        self.transpose, self.update, self.gather = P.Transpose(), P.ScatterUpdate(), P.Gather()
        self.rolls = cache.rolls

    def _laid_out(self, x_BSNP: Tensor) -> Tensor:
        """(B, S, N, P) -> (B*N*S, P)."""
        return ops.reshape(self.transpose(x_BSNP, (0, 2, 1, 3)), (-1, self.head_dim))

    def construct(self, x_TD: Tensor, cos_SP: Tensor, sin_SP: Tensor, places: Tensor, sources: Tensor | None) -> Tensor:
        B, S, own = self.rows, self.length, self.attention
        q = own.rotary(own.query(x_TD, S), cos_SP, sin_SP)
        k = own.rotary(own.key(x_TD, S), cos_SP, sin_SP)
        v = ops.reshape(own.wv(x_TD), (B, S, self.kv_heads, self.head_dim))
        keys, values = self._laid_out(k), self._laid_out(v)
        if self.rolls:
            keys, values = self.gather(keys, sources, 0), self.gather(values, sources, 0)
        self.update(self.cache.key, places, keys)
        self.update(self.cache.value, places, values)
        mixed = self.attend(ops.reshape(q, (B, S, -1)), ops.reshape(k, (B, S, -1)), ops.reshape(v, (B, S, -1)))
        return own.wo(ops.reshape(mixed, (B * S, -1)))


class TokenTables(nn.Cell):
    """What rotates queries and keys of one token per row, from cos and sin (B, 1, 1, P) at the tokens' positions.

    On CPU two matrices (B, P, P), for queries (scaled by 1/sqrt(P)) and for keys: made once for all layers, they leave
    each layer two small products where the embedding has sixteen kernels, which cost more than what they compute.
    Elsewhere cos and sin themselves.
    """

    def __init__(self, head_dim: int, dtype: ms.Type) -> None:
        super().__init__(auto_prefix=False)
        self.are_matrices, self.scale = are_matrices(), head_dim**-0.5
        half, identity = head_dim // 2, np.eye(head_dim)
        self.shape = (-1, 1, head_dim)
        self.identity = Tensor(identity[None], dtype)
        self.quarter_turn = Tensor(np.concatenate([identity[half:], -identity[:half]])[None], dtype)

    def construct(self, cos_BP: Tensor, sin_BP: Tensor) -> tuple[Tensor, Tensor]:
        if not self.are_matrices:
            return cos_BP, sin_BP
        cos, sin = ops.reshape(cos_BP, self.shape), ops.reshape(sin_BP, self.shape)
        turn = cos * self.identity + sin * self.quarter_turn
        return turn * self.scale, turn


def are_matrices() -> bool:
    """See ``TokenTables``: elsewhere few kernels are no gain, and matrix units may round."""
    return ms.get_context("device_target") == "CPU"


class TokenAttention(nn.Cell):
    """``attention`` of one new token per row over the cache.

    Inputs: x (B, D), the two of ``TokenTables``, place (B*N) int32 (the cache rows to write), mask (B, 1, M), an addend
    that hides what lies behind each row's position. Output (B, D).
    """

    def __init__(self, attention: Attention, cache: LayerCache, positions: int) -> None:
        super().__init__(auto_prefix=False)
        self.attention, self.cache = attention, cache
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.positions, self.scale, self.by_matrix = positions, attention.head_dim**-0.5, are_matrices()
        self.softmax_dtype = attention.softmax_dtype
        self.update, self.softmax = P.ScatterUpdate(), P.Softmax(axis=-1)
        self.product, self.product_nt = P.BatchMatMul(), P.BatchMatMul(transpose_b=True)

    def _rotated(self, x_BD: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries, scaled, and keys, per head."""
        own, first, second = self.attention, tables[0], tables[1]
        B = x_BD.shape[0]
        q, k = own.query(x_BD, 1), own.key(x_BD, 1)
        if self.by_matrix:
            q = self.product(ops.cast(ops.reshape(q, (B, self.heads, self.head_dim)), first.dtype), first)
            k = self.product(ops.cast(ops.reshape(k, (B, self.kv_heads, self.head_dim)), second.dtype), second)
            return ops.cast(q, x_BD.dtype), ops.cast(k, x_BD.dtype)
        return own.rotary(q, first, second) * self.scale, own.rotary(k, first, second)

    def construct(self, x_BD: Tensor, tables: tuple[Tensor, Tensor], places: Tensor, mask_BS: Tensor) -> Tensor:
        own, M = self.attention, self.positions
        B = x_BD.shape[0]
        q, k = self._rotated(x_BD, tables)
        v = own.wv(x_BD)
        keys = self.update(self.cache.key, places, ops.reshape(k, (-1, self.head_dim)))
        values = self.update(self.cache.value, places, ops.reshape(v, (-1, self.head_dim)))
        keys = ops.reshape(keys, (-1, M, self.head_dim))
        values = ops.reshape(values, (-1, M, self.head_dim))
        scores = self.product_nt(ops.reshape(q, (keys.shape[0], -1, self.head_dim)), keys)
        masked = ops.cast(ops.reshape(scores, (B, -1, M)), self.softmax_dtype) + mask_BS
        weights = ops.reshape(ops.cast(self.softmax(masked), q.dtype), scores.shape)
        return own.wo(ops.reshape(self.product(weights, values), (B, -1)))


def hidden_addend(dtype: ms.Type) -> float:
    """So low that its exponential is exactly 0 beside any score."""
    return -6e4 if dtype == ms.float16 else -1e9


def positions_tensor(count: int) -> Tensor:
    """(1, 1, count) int32: 0, 1, 2, ..."""
    return Tensor(np.arange(count, dtype=np.int32)[None, None])
