# SPDX-License-Identifier: Apache-2.0
"""Packed rows from primitives (``core.documents``): positions that begin anew in each document, and attention in it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.documents import MOST_DOCUMENTS
from mindformers_ext.ms.ops.portable_attention import AttentionBlock, CausalAttentionOp, causal_mask


def document_ends(documents_BS: Tensor) -> Tensor:
    """(B, 128) int32: how many tokens of a row stand in its first 1, 2, ... documents."""
    number = ops.reshape(ops.arange(1, MOST_DOCUMENTS + 1, dtype=ms.int32), (1, -1, 1))
    held = ops.expand_dims(documents_BS, 1)
    inside = ops.logical_and(held > 0, held <= number)
    return ops.cast(ops.cast(inside, ms.float32).sum(-1), ms.int32)  # exact: below 2^24


class DocumentTables(nn.Cell):
    """Rotary tables whose positions begin anew in every document.

    Inputs: documents (B, S) int32, cos and sin (1, S, 1, P). Outputs: cos and sin (B, S, 1, P).
    """

    def __init__(self) -> None:
        super().__init__()
        self.join = ops.Concat(axis=1)

    def construct(self, documents_BS: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> tuple[Tensor, Tensor]:
        ends = document_ends(documents_BS)
        # where document 1, 2, ... begins, and last, for 0, the padding
        begins = self.join((ops.zeros_like(ends[:, :1]), ends))
        which_BS = ops.select(documents_BS > 0, documents_BS - 1, ops.full_like(documents_BS, MOST_DOCUMENTS))
        begin_BS = ops.gather_elements(begins, 1, which_BS)
        place_BS = ops.reshape(ops.arange(documents_BS.shape[1], dtype=ms.int32), (1, -1)) - begin_BS
        return _rows(cos_SP, place_BS), _rows(sin_SP, place_BS)


def _rows(table_SP: Tensor, place_BS: Tensor) -> Tensor:
    return ops.gather(ops.squeeze(table_SP, 0), place_BS, 0)


class PackedBlock(AttentionBlock):
    """``AttentionBlock`` of whole rows with a mask (Z, S, S) of its own, an addend as ``causal_mask`` gives it."""

    def construct(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = self.product_nt(q, k)
        square = ops.cast(ops.reshape(scores, (q.shape[0], -1, mask.shape[1], mask.shape[2])), self.softmax_dtype)
        masked = square + ops.broadcast_to(ops.expand_dims(mask, 1), square.shape)
        weights = ops.reshape(ops.cast(self.softmax(masked), q.dtype), scores.shape)
        return self.product(weights, v), weights

    def bprop(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: tuple, dout: tuple
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq, dk, dv = self.gradients(q, k, v, out, dout)
        return dq, dk, dv, ops.zeros_like(mask)


class PackedAttentionOp(CausalAttentionOp):
    """``CausalAttentionOp`` within documents. Inputs: q, k and v as there, documents (B, S) int32, 0 = padding."""

    may_halve = False

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        seq_length: int,
        softmax_dtype: ms.Type,
        window: int | None = None,
    ) -> None:
        super().__init__(heads, kv_heads, head_dim, seq_length, softmax_dtype, window)
        self.last = PackedBlock(0, seq_length, head_dim, softmax_dtype, window)
        self.causal = causal_mask(0, seq_length, softmax_dtype, window)
        self.hidden = float(np.asarray(self.causal.asnumpy().min(), np.float32)) if seq_length > 1 else -6e4

    def construct(  # type: ignore[override]
        self, q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, documents_BS: Tensor
    ) -> Tensor:
        B, S, _ = q_BSD.shape
        q, k, v = self._split_queries(q_BSD * self.scale), self._split_keys(k_BSD), self._split_keys(v_BSD)
        apart_BSS = ops.expand_dims(documents_BS, 2) != ops.expand_dims(documents_BS, 1)
        mask_BSS = ops.minimum(ops.cast(apart_BSS, self.causal.dtype) * self.hidden, ops.expand_dims(self.causal, 0))
        mask = ops.repeat_elements(mask_BSS, self.kv_heads, 0) if self.kv_heads > 1 else mask_BSS
        mixed, _ = self.last(self._stacked(q), k, v, ops.stop_gradient(mask))
        mixed = self.transpose(ops.reshape(self._unstacked(mixed), (B, -1, S, self.head_dim)), (0, 2, 1, 3))
        return ops.reshape(mixed, (B, S, -1))
