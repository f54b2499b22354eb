# SPDX-License-Identifier: Apache-2.0
"""Routed experts beside shared ones that every token passes (DeepSeekMoE, arXiv:2401.06066, section 3.2; Qwen2-MoE;
LLaMA-MoE's residual experts, arXiv:2406.16554)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.feed_forward import FeedForwardOutput, SwiGlu
from mindformers_ext.pt.moe.gate import RouterGate
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.ops.dtypes import torch_dtype


class SharedMoE(nn.Module):
    """routed(x) + scale * sigmoid(w x) * shared(x), ``pt.feed_forward.FeedForward``; no sigmoid where it has no gate.

    Of several that are weighed each: routed(x) + sum of scale * score * shared expert(x). They are one feed-forward as
    wide as all, whose hidden values are multiplied by the score of their expert. Loss and report are the routed
    experts'.
    """

    def __init__(self, spec: NetworkSpec, moe: MoESpec, shared: SharedExpertSpec) -> None:
        super().__init__()
        self.routed_experts = MoE(spec, moe)
        self.shared_experts = SwiGlu(spec, shared.intermediate_size)
        self.shared_experts_gate: RouterGate | None = None
        self.weighting: RouterGate | None = None
        hidden, std, dtype = spec.model.hidden_size, spec.model.initializer_range, torch_dtype(moe.router_dtype)
        if shared.weighs_each:
            self.shared_experts_gate = RouterGate(hidden, shared.num_experts, 0.0, dtype)
        elif shared.gated:
            self.shared_experts_gate = RouterGate(hidden, 1, std, dtype)
        if shared.use_weighting:
            self.weighting = RouterGate(hidden, 2, std, dtype)
        self.shared, self.scale = shared, shared.scale_of(0)

    def forward(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        routed = self.routed_experts(x_TD, noise_TE, counted_T)
        return FeedForwardOutput(self._together(routed.y_TD, x_TD), routed.aux_loss_G, routed.report_GE)

    def _together(self, routed_TD: Tensor, x_TD: Tensor) -> Tensor:
        shared_TD = self._shared(x_TD)
        if self.weighting is None:
            return routed_TD + shared_TD
        share_T2 = torch.softmax(self.weighting(x_TD), -1).to(routed_TD.dtype)
        return routed_TD * share_T2[:, :1] + shared_TD * share_T2[:, 1:]

    def _shared(self, x_TD: Tensor) -> Tensor:
        if self.shared.weighs_each and self.shared_experts_gate is not None:
            return self._weighed_each(self.shared_experts_gate, x_TD)
        y_TD = self.shared_experts.dropless(x_TD)
        if self.shared_experts_gate is not None:
            y_TD = y_TD * torch.sigmoid(self.shared_experts_gate(x_TD)).to(y_TD.dtype)
        return y_TD if self.scale == 1.0 else y_TD * self.scale

    def _scores(self, logits_TE: Tensor) -> Tensor:
        """What experts that are weighed each are multiplied by (T, E)."""
        if not self.shared.multiply_gate_scores:
            return logits_TE * 0.0 + 1.0  # a gate that changes nothing has a gradient, of zeros
        return (torch.softmax(logits_TE, -1) if self.shared.gate_use_softmax else logits_TE) * self.scale

    def _weighed_each(self, gate: RouterGate, x_TD: Tensor) -> Tensor:
        hidden_TF = self.shared_experts.hidden(x_TD)
        each = hidden_TF.split(self.shared.sizes_of(0), 1)
        scores = self._scores(gate(x_TD)).to(hidden_TF.dtype).split(1, 1)
        return self.shared_experts.w2(torch.cat([part * score for part, score in zip(each, scores, strict=True)], 1))

    def dropless(self, x_TD: Tensor) -> Tensor:
        """See ``FeedForward``."""
        return self._together(self.routed_experts.dropless(x_TD), x_TD)

    def mixtures(self) -> Iterator[MoE]:
        """The routed experts; the shared one is on every rank."""
        yield self.routed_experts

    def capturable(self, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """As the routed experts are."""
        return self.routed_experts.capturable(tokens, dtype, device)
