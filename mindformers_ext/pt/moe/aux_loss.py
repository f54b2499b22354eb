# SPDX-License-Identifier: Apache-2.0
"""Load-balancing losses of one MoE layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mindformers_ext.core.layers import LEGACY_CONSTANT, MoESpec


class AuxiliaryLoss(nn.Module):
    """Sum of the expert, device, communication and z losses (DeepSeek-V2 section 2.2.3; ST-MoE section 3.2).

    Over parts of E/g neighbouring experts, with f the share of assignments and P the mean probability per expert:
    ``factor * E^2 * mean_g(mean(f) * mean(P))``. "expert" has g = E, "device" g = expert_group_size, "comm" g = expert
    parallel size. Every one equals its factor when the load is balanced.

    Inputs: logits (G, N, E), probabilities (G, N, E) that sum to 1 per token, counts (G, E), all float32, and which
    tokens (G, N) count, all where it is not told. Output (G).

    Of all layers together (``MoESpec.joins_layers``) the loss is no sum over layers: the output (G, 2E + 1) is f, P and
    the z loss, and ``JointLoss`` makes the loss of their sums.
    """

    def __init__(self, moe: MoESpec, expert_parallel: int = 1) -> None:
        super().__init__()
        parts = {"expert": moe.num_local_experts, "device": moe.expert_group_size or 1, "comm": expert_parallel}
        self.active = tuple((parts[kind], factor) for kind, factor in moe.aux_losses if factor > 0)
        self.experts = moe.num_local_experts
        self.z_factor = moe.z_loss_factor
        self.joins = moe.joins_layers
        self.constant = None
        if moe.aux_loss_type == LEGACY_CONSTANT:
            self.constant = sum(factor for _, factor in self.active) * self.experts / moe.num_experts_per_tok**2

    @property
    def balances(self) -> bool:
        """Whether any loss but the z loss is on."""
        return bool(self.active)

    def forward(
        self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None
    ) -> Tensor:
        G, _, E = logits_GNE.shape
        total_G = logits_GNE.new_zeros(G)
        if self.constant is not None:
            total_G = total_G + self.constant
        elif self.active and not self.joins:
            share_GE, mean_GE = _shares(prob_GNE, counts_GE, counted_GN)
            for parts, factor in self.active:
                pools = (G, parts, E // parts)
                product = share_GE.reshape(pools).mean(-1) * mean_GE.reshape(pools).mean(-1)
                total_G = total_G + factor * E**2 / parts * product.sum(-1)
        if self.z_factor > 0:
            square_GN = torch.logsumexp(logits_GNE, -1).square()
            total_G = total_G + self.z_factor * mean_of(square_GN[..., None], counted_GN)[..., 0]
        if self.joins:
            return torch.cat((*_shares(prob_GNE, counts_GE, counted_GN), total_G[:, None]), 1)
        return total_G


def _shares(prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None) -> tuple[Tensor, Tensor]:
    """f and P (G, E)."""
    return counts_GE / counts_GE.sum(-1, keepdim=True).clamp(min=1), mean_of(prob_GNE, counted_GN)


class JointLoss:
    """The loss () over the tokens of ``layers`` together, from sums over them (G, W): what ``AuxiliaryLoss`` of each of
    ``gates`` gives, side by side."""

    def __init__(self, gates: Sequence[MoESpec], layers: int) -> None:
        self.gates = [(moe.num_local_experts, sum(factor for _, factor in moe.aux_losses)) for moe in gates]
        self.layers = layers

    def __call__(self, sums: Tensor) -> Tensor:
        """E * sum of (mean f) * (mean P) times the factor, and the mean z loss."""
        means, total, place = sums / self.layers, sums.new_zeros(len(sums)), 0
        for experts, factor in self.gates:
            share_GE, prob_GE, z_G1 = means[:, place : place + 2 * experts + 1].split((experts, experts, 1), 1)
            total = total + factor * experts * (share_GE * prob_GE).sum(1) + z_G1[:, 0]
            place += 2 * experts + 1
        return total.mean()


def mean_of(x_GNE: Tensor, counted_GN: Tensor | None) -> Tensor:
    """The mean (G, E) over tokens, or over those that count."""
    if counted_GN is None:
        return x_GNE.mean(1)
    weight_GN = counted_GN.to(x_GNE.dtype)
    return (x_GNE * weight_GN[..., None]).sum(1) / weight_GN.sum(1, keepdim=True).clamp(min=1)
