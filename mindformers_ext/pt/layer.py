# SPDX-License-Identifier: Apache-2.0
"""One layer of the decoder, built from its ``LayerSpec``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindformers_ext.core.layers import DenseSpec, LayerSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.expert_attention import build_attention
from mindformers_ext.pt.feed_forward import FeedForward, FeedForwardOutput, SwiGlu
from mindformers_ext.pt.moe import noisy_gate as noisy_gate
from mindformers_ext.pt.moe import threshold_gate as threshold_gate
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.moe.shared import SharedMoE
from mindformers_ext.pt.norm import RmsNorm


def build_feed_forward(spec: NetworkSpec, layer: LayerSpec) -> FeedForward:
    """Dense, a mixture, or a mixture with a shared expert; with fresh random weights."""
    wanted = layer.feed_forward
    if isinstance(wanted, DenseSpec):
        return SwiGlu(spec, wanted.intermediate_size, wanted.bias)
    return SharedMoE(spec, wanted, wanted.shared_expert) if wanted.shared_expert else MoE(spec, wanted)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual.

    Inputs (T, D), the rotary tables, of a mixture the noise (T, E) that its gate adds, and of packed rows their
    documents (B, S); output as that of its feed-forward layer, with y (T, D) the state behind this layer.
    """

    def __init__(self, spec: NetworkSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec)
        self.attention = build_attention(spec, layer.attention)
        self.ffn_norm = RmsNorm(spec)
        self.feed_forward = build_feed_forward(spec, layer)

    def forward(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        noise_TE: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> FeedForwardOutput:
        mixed_TD, loss_G = self.attention.with_loss(self.attention_norm(x_TD), cos, sin, documents_BS)
        x_TD = x_TD + mixed_TD
        counted_T = None if documents_BS is None else documents_BS.reshape(-1) > 0
        fed = self.feed_forward(self.ffn_norm(x_TD), noise_TE, counted_T)
        aux_loss_G = fed.aux_loss_G
        if loss_G is not None and aux_loss_G is not None:  # of all layers together: side by side
            aux_loss_G = aux_loss_G + loss_G if loss_G.dim() == 1 else torch.cat((aux_loss_G, loss_G), 1)
        return FeedForwardOutput(x_TD + fed.y_TD, aux_loss_G, fed.report_GE)
