# SPDX-License-Identifier: Apache-2.0
"""Routed experts beside one that every token passes (DeepSeekMoE, arXiv:2401.06066, section 3.2; Qwen2-MoE)."""

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

    Loss and report are the routed experts'.
    """

    def __init__(self, spec: NetworkSpec, moe: MoESpec, shared: SharedExpertSpec) -> None:
        super().__init__()
        self.routed_experts = MoE(spec, moe)
        self.shared_experts = SwiGlu(spec, shared.intermediate_size)
        self.shared_experts_gate: RouterGate | None = None
        if shared.gated:
            model, dtype = spec.model, torch_dtype(moe.router_dtype)
            self.shared_experts_gate = RouterGate(model.hidden_size, 1, model.initializer_range, dtype)
        self.scale = shared.scale

    def forward(self, x_TD: Tensor, noise_TE: Tensor | None = None) -> FeedForwardOutput:
        routed = self.routed_experts(x_TD, noise_TE)
        return FeedForwardOutput(routed.y_TD + self._shared(x_TD), routed.aux_loss_G, routed.report_GE)

    def _shared(self, x_TD: Tensor) -> Tensor:
        y_TD = self.shared_experts.dropless(x_TD)
        if self.shared_experts_gate is not None:
            y_TD = y_TD * torch.sigmoid(self.shared_experts_gate(x_TD)).to(y_TD.dtype)
        return y_TD if self.scale == 1.0 else y_TD * self.scale

    def dropless(self, x_TD: Tensor) -> Tensor:
        """See ``FeedForward``."""
        return self.routed_experts.dropless(x_TD) + self._shared(x_TD)

    def mixtures(self) -> Iterator[MoE]:
        """The routed experts; the shared one is on every rank."""
        yield self.routed_experts

    def capturable(self, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """As the routed experts are."""
        return self.routed_experts.capturable(tokens, dtype, device)
