# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with rotary embedding, on torch's scaled_dot_product_attention."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.layers import AttentionSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.linear import Linear
from mindformers_ext.pt.norm import RmsNorm
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.packed import select_packed
from mindformers_ext.pt.ops.products import is_for_numpy

LONG = 2**18  # numbers of the keys from which numpy is asked: a shorter cache is read by torch sooner


def rotary_tables(
    tables: tuple[np.ndarray, np.ndarray], dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines (S, P) of ``core.rope`` as tensors."""
    cos, sin = (torch.tensor(table, dtype=dtype, device=device) for table in tables)
    return cos, sin


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(S, S) bool, True where a query sees a key; None where the window hides nothing that is not in the future."""
    if window is None or window >= length:
        return None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None]
    return (distance >= 0) & (distance < window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rotary embedding of x (..., P) in the tables' type; the result has x's."""
    low, high = x.to(cos.dtype).chunk(2, -1)
    return (x.to(cos.dtype) * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


def _attend_one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(1, H P) of one query (1, H, 1, P) that sees every key (1, N, S, P), by numpy, which has the threads."""
    q_NGP, k_NSP, v_NSP = q.view(k.shape[1], -1, q.shape[-1]).numpy(), k[0].numpy(), v[0].numpy()
    mixed_NGP, scale = np.empty(q_NGP.shape, np.float32), np.float32(q.shape[-1] ** -0.5)
    for head, (q_GP, k_SP, v_SP) in enumerate(zip(q_NGP, k_NSP, v_NSP, strict=True)):
        score_GS = np.dot(q_GP * scale, k_SP.T)
        np.exp(score_GS - score_GS.max(1, keepdims=True), out=score_GS)
        mixed_NGP[head] = np.dot(score_GS, v_SP) / score_GS.sum(1, keepdims=True)
    return torch.from_numpy(mixed_NGP.reshape(1, -1))


class Attention(nn.Module):
    """Causal self-attention. Input (B*S, D) and the rotary tables (S, P); output (B*S, D). Of packed rows also their
    documents (B, S), with tables (B, 1, S, P).

    The softmax runs in float32 inside torch's kernel, whatever ``softmax_compute_type`` says.
    """

    def __init__(self, spec: NetworkSpec, attention: AttentionSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads = attention.num_attention_heads, attention.num_key_value_heads
        self.head_dim, self.window = attention.head_dim, attention.window
        hidden, width, kv_width = spec.model.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        std, dtype, bias = spec.model.initializer_range, torch_dtype(spec.numerics.param_dtype), attention.qkv_bias
        self.wq = Linear(hidden, width, std, dtype, bias)
        self.wk = Linear(hidden, kv_width, std, dtype, bias)
        self.wv = Linear(hidden, kv_width, std, dtype, bias)
        self.wo = Linear(width, hidden, std, dtype, attention.out_bias)
        self.q_norm = RmsNorm(spec, self.head_dim) if attention.qk_norm else None
        self.k_norm = RmsNorm(spec, self.head_dim) if attention.qk_norm else None

    def project(self, x_TD: Tensor, length: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, S, P), k and v (B, N, S, P), q and k turned by tables that broadcast to (B, H, S, P)."""

        def heads(x: Tensor, count: int, norm: RmsNorm | None = None) -> Tensor:
            x = x.view(-1, length, count, self.head_dim)
            return (x if norm is None else norm(x)).transpose(1, 2)

        q = rotate(heads(self.wq(x_TD), self.heads, self.q_norm), cos, sin)
        k = rotate(heads(self.wk(x_TD), self.kv_heads, self.k_norm), cos, sin)
        return q, k, heads(self.wv(x_TD), self.kv_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(P)) v, causal and within the window without ``mask``, through the output projection:
        (B*S, D). A single query without ``mask`` sees every key."""
        return self.wo(self._attend(q, k, v, mask))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length = q.shape[2]
        if length == 1 and mask is None and k.numel() >= LONG and is_for_numpy(q):
            return _attend_one_query(q, k, v)
        mask = window_mask(length, self.window, q.device) if mask is None else mask
        causal = mask is None and length > 1
        grouped = self.heads != self.kv_heads
        return self._joined(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        )

    def _joined(self, mixed: Tensor) -> Tensor:
        """(B*S, H P) of (B, H, S, P)."""
        return mixed.transpose(1, 2).reshape(-1, self.heads * self.head_dim)

    def context(self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """What enters the output projection, (B*S, H P)."""
        q, k, v = self.project(x_TD, cos.shape[-2], cos, sin)
        if documents_BS is None:
            return self._attend(q, k, v)
        return self._joined(select_packed(q.device, q.dtype)(q, k, v, documents_BS, self.window))

    def with_loss(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and a loss of its own (G), where heads are experts."""
        return self(x_TD, cos, sin, documents_BS), None

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        return self.wo(self.context(x_TD, cos, sin, documents_BS))
