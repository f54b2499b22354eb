# SPDX-License-Identifier: Apache-2.0
"""Causal attention from primitives, with its gradient written out.

Two savings over the plain form, both exact. Long sequences are cut into two halves, and the first multiplies only the
keys it may see: a quarter of all scores is never computed. And the softmax gradient takes its row sums from the
output, rowsum(dP * P) = rowsum(dO * O) (Dao et al. 2022, section 3.1), which is the narrow side.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

_HALVES_FROM = 512


def causal_mask(first_query: int, queries: int, dtype: ms.Type, window: int | None = None) -> Tensor:
    """(queries, first_query + queries) addend: 0 where a query may see a key, else so low that exp gives exactly 0."""
    distance = np.arange(first_query, first_query + queries)[:, None] - np.arange(first_query + queries)[None]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return Tensor(np.where(hidden, -6e4 if dtype == ms.float16 else -1e9, 0.0).astype(np.float32), dtype)


class AttentionBlock(nn.Cell):
    """softmax(q k^T + mask) v for the queries of one block.

    Inputs: q (Z, R*Sq, P) scaled, k and v (Z, Sk, P), Z = B*N, R = H/N query heads stacked. Outputs: mixed
    (Z, R*Sq, P) and the weights (Z, R*Sq, Sk), which only the gradient reads.
    """

    def __init__(
        self, first_query: int, queries: int, head_dim: int, softmax_dtype: ms.Type, window: int | None = None
    ) -> None:
        super().__init__()
        self.mask = causal_mask(first_query, queries, softmax_dtype, window)
        self.square = (-1, queries, first_query + queries)
        self.softmax_dtype = softmax_dtype
        self.softmax = P.Softmax(axis=-1)
        self.product = P.BatchMatMul()
        self.product_nt = P.BatchMatMul(transpose_b=True)
        self.product_tn = P.BatchMatMul(transpose_a=True)
        self.ones_P = Tensor(np.ones((head_dim, 1), np.float32))
        self.row_sum = P.MatMul()
        self.join = P.Concat(axis=2)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.product_nt(q, k)
        square = ops.cast(ops.reshape(scores, self.square), self.softmax_dtype)
        masked = square + ops.broadcast_to(self.mask, square.shape)  # see portable: shapes that differ are slow
        weights = ops.reshape(ops.cast(self.softmax(masked), q.dtype), scores.shape)
        return self.product(weights, v), weights

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, Tensor, Tensor]:
        return self.gradients(q, k, v, out, dout)

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Those at q, k and v."""
        mixed, weights = out
        dmixed = dout[0]
        along = ops.cast(ops.reshape(mixed * dmixed, (-1, mixed.shape[2])), ms.float32)
        along = ops.reshape(self.row_sum(along, self.ones_P), (mixed.shape[0], mixed.shape[1], 1))
        # one more column, against ones: the product subtracts the row sums, which need not be spread over the scores
        columns = self.join((dmixed, ops.neg(ops.cast(along, weights.dtype))))
        against = self.join((v, ops.ones((v.shape[0], v.shape[1], 1), v.dtype)))
        dscores = weights * self.product_nt(columns, against)
        return self.product(dscores, k), self.product_tn(dscores, q), self.product_tn(weights, dmixed)


class CausalAttentionOp(nn.Cell):
    """Grouped-query causal attention; key and value heads are shared by stacking queries, never repeated.

    Inputs: ``q`` (B, S, H*P), ``k`` and ``v`` (B, S, N*P). Output: (B, S, H*P). S is the length it was built for.
    ``window``: tokens that a token sees, itself included; None: all before it.
    """

    may_halve = True

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        seq_length: int,
        softmax_dtype: ms.Type,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.kv_heads, self.repeats, self.head_dim = kv_heads, heads // kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.halved = self.may_halve and seq_length >= _HALVES_FROM and seq_length % 2 == 0
        self.last_length = seq_length // 2 if self.halved else seq_length
        self.last = AttentionBlock(seq_length - self.last_length, self.last_length, head_dim, softmax_dtype, window)
        if self.halved:
            self.first = AttentionBlock(0, self.last_length, head_dim, softmax_dtype, window)
        self.halve_queries = P.Split(axis=2, output_num=2)
        self.halve_keys = P.Split(axis=1, output_num=2)
        self.join = P.Concat(axis=2)
        self.transpose = P.Transpose()

    def _split_queries(self, x_BSD: Tensor) -> Tensor:
        """(B, S, H*P) -> (B*N, R, S, P)."""
        B, S, _ = x_BSD.shape
        x = ops.reshape(x_BSD, (B, S, self.kv_heads, self.repeats, self.head_dim))
        return ops.reshape(self.transpose(x, (0, 2, 3, 1, 4)), (-1, self.repeats, S, self.head_dim))

    def _split_keys(self, x_BSD: Tensor) -> Tensor:
        """(B, S, N*P) -> (B*N, S, P)."""
        B, S, _ = x_BSD.shape
        x = self.transpose(ops.reshape(x_BSD, (B, S, self.kv_heads, self.head_dim)), (0, 2, 1, 3))
        return ops.reshape(x, (-1, S, self.head_dim))

    def _stacked(self, q: Tensor) -> Tensor:
        """(Z, R, Sq, P) -> (Z, R*Sq, P)."""
        return ops.reshape(q, (q.shape[0], -1, self.head_dim))

    def _unstacked(self, mixed: Tensor) -> Tensor:
        return ops.reshape(mixed, (-1, self.repeats, self.last_length, self.head_dim))

    def construct(self, q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        B, S, _ = q_BSD.shape
        q, k, v = self._split_queries(q_BSD * self.scale), self._split_keys(k_BSD), self._split_keys(v_BSD)
        if self.halved:
            q_first, q_last = self.halve_queries(q)
            k_first, _ = self.halve_keys(k)
            v_first, _ = self.halve_keys(v)
            mixed_first, _ = self.first(self._stacked(q_first), k_first, v_first)
            mixed_last, _ = self.last(self._stacked(q_last), k, v)
            mixed = self.join((self._unstacked(mixed_first), self._unstacked(mixed_last)))
        else:
            mixed, _ = self.last(self._stacked(q), k, v)
        mixed = self.transpose(ops.reshape(mixed, (B, -1, S, self.head_dim)), (0, 2, 1, 3))
        return ops.reshape(mixed, (B, S, -1))
