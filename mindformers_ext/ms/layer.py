# SPDX-License-Identifier: Apache-2.0
"""One layer of the decoder, built from its ``LayerSpec``."""

from __future__ import annotations

import mindspore.ops.operations as P
from mindspore import Tensor, nn

from mindformers_ext.core.layers import DenseSpec, LayerSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.expert_attention import build_attention
from mindformers_ext.ms.feed_forward import FeedForward, FeedForwardOutput, SwiGlu
from mindformers_ext.ms.moe import noisy_gate as noisy_gate
from mindformers_ext.ms.moe import threshold_gate as threshold_gate
from mindformers_ext.ms.moe.layer import MoE
from mindformers_ext.ms.moe.shared import SharedMoE
from mindformers_ext.ms.norm import RmsNorm
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


def build_feed_forward(spec: NetworkSpec, layer: LayerSpec, operators: Operators) -> FeedForward:
    """The second half of ``layer`` with fresh random weights: dense, experts, or experts with a shared one."""
    wanted = layer.feed_forward
    if isinstance(wanted, DenseSpec):
        return SwiGlu(spec, wanted.intermediate_size, operators, wanted.bias)
    return (SharedMoE if wanted.shared_expert else MoE)(spec, wanted, operators)


class Layer(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to the residual.

    Inputs: x (T, D), the rotary tables, of a mixture the noise (T, E) that its gate adds, and of packed rows their
    documents (B, S) and which tokens (T) count, 1 or 0. Outputs: ``FeedForwardOutput``.
    """

    def __init__(self, spec: NetworkSpec, layer: LayerSpec, operators: Operators) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec, operators)
        self.attention = build_attention(spec, layer.attention, operators)
        self.attends_by_experts = layer.attention.experts is not None
        self.ffn_norm = RmsNorm(spec, operators)
        self.feed_forward = build_feed_forward(spec, layer, operators)
        self.add = Shards(spec).shard(P.Add(), "residual")
        self.add_losses = Shards(spec).shard(P.Add(), "groups")
        self.joins, self.join = layer.moe is not None and layer.moe.joins_layers, P.Concat(axis=1)

    def construct(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        noise_TE: Tensor | None = None,
        documents_BS: Tensor | None = None,
        counted_T: Tensor | None = None,
    ) -> FeedForwardOutput:
        if self.attends_by_experts:
            mixed_TD, loss_G = self.attention(self.attention_norm(x_TD), cos, sin, documents_BS, counted_T)
            x_TD = self.add(x_TD, mixed_TD)
            y_TD, aux_loss_G, report_GE = self.feed_forward(self.ffn_norm(x_TD), noise_TE, counted_T)
            if self.joins:  # one loss for all layers: side by side
                return self.add(x_TD, y_TD), self.join((aux_loss_G, loss_G)), report_GE
            return self.add(x_TD, y_TD), self.add_losses(aux_loss_G, loss_G), report_GE
        x_TD = self.add(x_TD, self.attention(self.attention_norm(x_TD), cos, sin, documents_BS))
        y_TD, aux_loss_G, report_GE = self.feed_forward(self.ffn_norm(x_TD), noise_TE, counted_T)
        return self.add(x_TD, y_TD), aux_loss_G, report_GE
