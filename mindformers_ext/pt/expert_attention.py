# SPDX-License-Identifier: Apache-2.0
"""Attention whose key/value heads, each with its query heads, are experts (LLaMA-MoE v2, arXiv:2411.15708).

A token is routed to some of them; there it asks, and there alone it is found by those that come later. All heads are
computed for all tokens, which keeps shapes fixed; what a token does not pass is hidden as a key, and weighs nothing as
a query (spec of LLaMA-MoE v2, section 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.layers import AttentionSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.attention import Attention
from mindformers_ext.pt.moe.gate import LinearGate
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.packed import document_mask


class Passed(NamedTuple):
    """weight_BSE (B, S, E) float32: what an expert's output is multiplied by, 0 where a token does not pass it;
    seen_BES (B, E, S) bool: where it does; aux_loss_G: the loss that balances, None in inference."""

    weight_BSE: Tensor
    seen_BES: Tensor
    aux_loss_G: Tensor | None = None


class ExpertAttention(Attention):
    """See the module. The gate's weight is ``router.dense.weight`` (A, D); ``expert_bias`` (A, D), where there is one,
    is added to an expert's output before it is weighed."""

    def __init__(self, spec: NetworkSpec, attention: AttentionSpec) -> None:
        super().__init__(spec, attention)
        if attention.experts is None:
            raise ValueError("an attention without experts")
        self.router, self.groups = LinearGate(spec, attention.experts), spec.parallel.groups
        self.expert_bias: nn.Parameter | None = None
        if attention.experts.expert_bias:
            shape = self.kv_heads, spec.model.hidden_size
            self.expert_bias = nn.Parameter(torch.zeros(shape, dtype=torch_dtype(spec.numerics.param_dtype)))

    def passed(self, x_TD: Tensor, length: int, trains: bool = False, counted_T: Tensor | None = None) -> Passed:
        """Which experts each token of rows of ``length`` passes; with the loss where it ``trains``, over the tokens
        that count."""
        x_GND = x_TD.view(self.groups if trains else 1, -1, x_TD.shape[1])
        loss = None
        if trains:
            choice = self.router(x_GND, None, None if counted_T is None else counted_T.view(x_GND.shape[:2]))
            expert_GNK, weight_GNK, loss = choice.expert_GNK, choice.weight_GNK, choice.aux_loss_G
        else:
            weight_GNK, expert_GNK = self.router.choose(x_GND)
        place_TK, weight_TK = expert_GNK.flatten(0, 1), weight_GNK.flatten(0, 1)
        empty_TE = weight_TK.new_zeros(len(place_TK), self.kv_heads)
        weight_TE = empty_TE.scatter(1, place_TK, weight_TK)
        seen_TE = torch.zeros_like(empty_TE, dtype=torch.bool).scatter(1, place_TK, True)
        return Passed(
            weight_TE.view(-1, length, self.kv_heads), seen_TE.view(-1, length, self.kv_heads).transpose(1, 2), loss
        )

    def mix_passed(
        self, q: Tensor, k: Tensor, v: Tensor, passed: Passed, seen_BES: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """As ``mix``, of keys that their experts have ``seen``, weighed by what was ``passed``."""
        length, times = q.shape[2], self.heads // self.kv_heads
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        allowed = (mask & seen_BES[:, :, None]).repeat_interleave(times, 1)
        hidden = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min / 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=times > 1)
        weight_BSE = passed.weight_BSE.to(mixed.dtype)
        weight = weight_BSE.transpose(1, 2).repeat_interleave(times, 1)[..., None]
        out_TD = self.wo((mixed * weight).transpose(1, 2).reshape(-1, self.heads * self.head_dim))
        if self.expert_bias is None:
            return out_TD
        return out_TD + weight_BSE.flatten(0, 1) @ self.expert_bias.to(out_TD.dtype)

    def with_loss(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B*S, D), and the loss that balances the experts (G)."""
        counted_T = None if documents_BS is None else documents_BS.reshape(-1) > 0
        passed = self.passed(x_TD, cos.shape[-2], trains=True, counted_T=counted_T)
        q, k, v = self.project(x_TD, cos.shape[-2], cos, sin)
        mask = None if documents_BS is None else document_mask(documents_BS, None)
        return self.mix_passed(q, k, v, passed, passed.seen_BES, mask), passed.aux_loss_G

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        return self.with_loss(x_TD, cos, sin, documents_BS)[0]


def build_attention(spec: NetworkSpec, attention: AttentionSpec) -> Attention:
    """Plain, or with experts; with fresh random weights."""
    return (ExpertAttention if attention.experts else Attention)(spec, attention)
