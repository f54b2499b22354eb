# SPDX-License-Identifier: Apache-2.0
"""Load-balancing losses of one MoE layer."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import LEGACY_CONSTANT, MoESpec


class AuxiliaryLoss(nn.Cell):
    """Sum of the expert, device, communication and z losses (DeepSeek-V2 section 2.2.3; ST-MoE section 3.2).

    Over parts of E/g neighbouring experts, with f the share of assignments and P the mean probability per expert:
    ``factor * E^2 * mean_g(mean(f) * mean(P))``, averaged over routing groups. "expert" has g = E, "device"
    g = expert_group_size, "comm" g = expert parallel size. Every one equals its factor when the load is balanced.

    Inputs: logits (G, N, E), probabilities (G, N, E) that sum to 1 per token, counts (G, E), all float32; where not all
    tokens count, 1 or 0 for each (G, N). Output (); ``per_group`` gives (G), whose mean it is.

    Of all layers together (``MoESpec.joins_layers``) the loss is no sum over layers: ``per_group`` gives f, P and the z
    loss (G, 2E + 1), and ``JointLoss`` makes the loss of their sums.
    """

    def __init__(self, moe: MoESpec, expert_parallel: int = 1) -> None:
        super().__init__()
        experts = moe.num_local_experts
        parts = {"expert": experts, "device": moe.expert_group_size or 1, "comm": expert_parallel}
        active = tuple((parts[kind], factor) for kind, factor in moe.aux_losses if factor > 0)
        self.balances = bool(active)
        self.z_factor = moe.z_loss_factor
        self.pools = tuple(Tensor(_pooling(experts, count)) for count, _ in active)
        self.weights = tuple(factor * experts**2 / count for count, factor in active)
        self.matmul = P.MatMul()
        self.joins, self.join = moe.joins_layers, P.Concat(axis=1)
        self.is_constant = moe.aux_loss_type == LEGACY_CONSTANT
        self.constant = sum(factor for _, factor in active) * experts / moe.num_experts_per_tok**2

    def construct(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor) -> Tensor:
        return self.per_group(logits_GNE, prob_GNE, counts_GE).mean()

    def per_group(
        self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None
    ) -> Tensor:
        """The loss of every routing group (G)."""
        total_G = ops.zeros((logits_GNE.shape[0],), logits_GNE.dtype)
        if self.is_constant:
            total_G = total_G + self.constant
        elif self.balances and not self.joins:
            share_GE, mean_GE = self._shares(prob_GNE, counts_GE, counted_GN)
            for i in range(len(self.pools)):
                pool, weight = self.pools[i], self.weights[i]
                product = self.matmul(share_GE, pool) * self.matmul(mean_GE, pool)
                total_G = total_G + weight * product.sum(-1)
        if self.z_factor > 0:
            # Shifted by the maximum: exp never overflows (the unshifted form is inf * 0 = nan above 88).
            top = ops.stop_gradient(logits_GNE.max(-1, keepdims=True))
            logsumexp = ops.log(ops.exp(logits_GNE - top).sum(-1)) + ops.squeeze(top, -1)
            total_G = total_G + self.z_factor * mean_of(ops.expand_dims(ops.square(logsumexp), -1), counted_GN)[:, 0]
        if self.joins:
            return self.join((*self._shares(prob_GNE, counts_GE, counted_GN), ops.expand_dims(total_G, 1)))
        return total_G

    def _shares(self, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None) -> tuple[Tensor, Tensor]:
        """f and P (G, E)."""
        return counts_GE / ops.maximum(counts_GE.sum(-1, keepdims=True), 1.0), mean_of(prob_GNE, counted_GN)


class JointLoss(nn.Cell):
    """The loss () over the tokens of ``layers`` together, from sums over them (G, W): what ``AuxiliaryLoss.per_group``
    of each of ``gates`` gives, side by side."""

    def __init__(self, gates: Sequence[MoESpec], layers: int) -> None:
        super().__init__()
        self.gates = tuple((moe.num_local_experts, sum(factor for _, factor in moe.aux_losses)) for moe in gates)
        self.layers = float(layers)

    def construct(self, sums: Tensor) -> Tensor:
        means, place = sums / self.layers, 0
        total_G = ops.zeros((sums.shape[0],), sums.dtype)
        for experts, factor in self.gates:
            share_GE, behind = means[:, place : place + experts], place + 2 * experts
            total_G = total_G + factor * experts * (share_GE * means[:, place + experts : behind]).sum(1)
            total_G = total_G + means[:, behind]
            place = behind + 1
        return total_G.mean()


def mean_of(x_GNE: Tensor, counted_GN: Tensor | None) -> Tensor:
    """The mean (G, E) over tokens, or over those that count."""
    if counted_GN is None:
        return x_GNE.mean(1)
    total_GE = (x_GNE * ops.expand_dims(counted_GN, -1)).sum(1)
    return total_GE / ops.maximum(counted_GN.sum(-1, keepdims=True), 1.0)


def _pooling(experts: int, parts: int) -> np.ndarray:
    """(E, parts) matrix that averages each part's E/parts neighbouring experts."""
    size = experts // parts
    return (np.arange(experts)[:, None] // size == np.arange(parts)[None]).astype(np.float32) / size
