# SPDX-License-Identifier: Apache-2.0
"""The gate by threshold: a token passes every expert whose score W x + b is 0 or more, none or all of them, and each
adds what it computes as it is. No loss, and no gradient: what is chosen does not change smoothly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.moe.gate import GATES, Choice, RouterGate
from mindformers_ext.pt.ops.dtypes import torch_dtype


class BiasedGate(RouterGate):
    """x W^T + b, the sum in float32; bias (out) float32."""

    def __init__(self, width_in: int, width_out: int, std: float, dtype: torch.dtype) -> None:
        super().__init__(width_in, width_out, std, dtype)
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD) + self.bias.float()


class ThresholdGate(nn.Module):
    """``pt.moe.gate.Gate`` of E places a token: expert e in place e where it is chosen, else E, which is none."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec) -> None:
        super().__init__()
        model, dtype = spec.model, torch_dtype(moe.router_dtype)
        self.experts = moe.num_local_experts
        self.dense = BiasedGate(model.hidden_size, self.experts, model.initializer_range, dtype)

    def choose(self, x_GND: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Gate``."""
        chosen_GNE = (self.dense(x_GND.flatten(0, 1)) >= 0).view(*x_GND.shape[:2], -1)
        number_E = torch.arange(self.experts, device=x_GND.device)
        return chosen_GNE.float(), torch.where(chosen_GNE, number_E, self.experts)

    def forward(self, x_GND: Tensor, noise_TE: Tensor | None = None, counted_GN: Tensor | None = None) -> Choice:
        weight_GNE, expert_GNE = self.choose(x_GND)
        chosen_GNE = expert_GNE < self.experts
        told_GE = None if counted_GN is None else (chosen_GNE & counted_GN[..., None]).sum(1)
        # the gradient is zero, not missing
        loss_G = sum((weight.sum() * 0.0 for weight in self.parameters()), weight_GNE.new_zeros(x_GND.shape[0]))
        return Choice(expert_GNE, weight_GNE, loss_G, chosen_GNE.sum(1), told_GE)


GATES |= {"threshold": ThresholdGate}
