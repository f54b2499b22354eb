# SPDX-License-Identifier: Apache-2.0
"""Top-k routing with capacity: MindFormers' ``TopkRouterV2``, without slots.

One routing group G per data-parallel slice, as in ``ms.moe.router``, whose integers these are. The position of an
assignment inside its expert comes from one stable sort of expert numbers in drop order: O(kN) memory, no host
synchronisation. Of equal probabilities the lower expert number comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.spec import MoESpec, ParallelSpec
from mindformers_ext.pt.moe.aux_loss import AuxiliaryLoss


class Routing(NamedTuple):
    """What a router decides.

    expert_GNK (G, N, K) int64, best first; coeff_GNK (G, N, K) float32 gate, 0 where dropped; kept_GNK (G, N, K) bool,
    None when nothing can be dropped; aux_loss_G (G); counts_GE (G, E) float32 assignments before dropping; dropped_G
    (G) float32 their share that was dropped.
    """

    expert_GNK: Tensor
    coeff_GNK: Tensor
    kept_GNK: Tensor | None
    aux_loss_G: Tensor
    counts_GE: Tensor
    dropped_G: Tensor


class TopkRouterV2(nn.Module):
    """Chooses experts (GShard; DeepSeek-V2 section 2.2 for group limits; DeepSeek-V3 2.1 for the bias).

    Input: logits (G, N, E) float32; output: ``Routing``. ``topk_bias`` (E), where the spec has one, chooses and never
    weighs; it is moved by the training loop and is no parameter.
    """

    def __init__(self, moe: MoESpec, parallel: ParallelSpec | None = None) -> None:
        super().__init__()
        parallel = parallel or ParallelSpec()
        self.moe = moe
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.multiple = parallel.router_model_parallel * moe.comp_comm_parallel_degree
        self.normalise = moe.norm_topk_prob and (self.chosen > 1 or moe.norm_single_choice)
        self.drops_only_in_training = False
        if moe.balance_via_topk_bias:
            self.register_buffer("topk_bias", torch.zeros(self.experts))
        self.aux_loss = AuxiliaryLoss(moe, parallel.expert_parallel)

    def forward(self, logits_GNE: Tensor) -> Routing:
        G, N, E = logits_GNE.shape
        prob_GNE = self._probabilities(logits_GNE)
        gate_GNK, expert_GNK = self._gates(prob_GNE)
        counts_GE = _counts(expert_GNK, E)
        dropless = self.moe.capacity_factor <= 0 or (self.drops_only_in_training and not self.training)
        kept_GNK = None if dropless else self._kept(expert_GNK, counts_GE)
        dropped_G = logits_GNE.new_zeros(G)
        if kept_GNK is not None:
            gate_GNK = torch.where(kept_GNK, gate_GNK, gate_GNK.new_zeros(()))
            dropped_G = 1.0 - kept_GNK.sum((1, 2)) / max(self.chosen * N, 1)
        aux_loss_G = self._auxiliary(logits_GNE, prob_GNE, counts_GE)
        return Routing(expert_GNK, gate_GNK, kept_GNK, aux_loss_G, counts_GE.to(torch.float32), dropped_G)

    def choose(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (G, N, K) float32 and experts (G, N, K), nothing dropped and nothing counted: inference."""
        return self._gates(self._probabilities(logits_GNE))

    def _probabilities(self, logits_GNE: Tensor) -> Tensor:
        return torch.sigmoid(logits_GNE) if self.moe.use_gating_sigmoid else torch.softmax(logits_GNE, -1)

    def _gates(self, prob_GNE: Tensor) -> tuple[Tensor, Tensor]:
        score_GNE = prob_GNE.detach()
        if self.moe.balance_via_topk_bias:
            score_GNE = score_GNE + self.topk_bias
        if self.moe.topk_method != "greedy":
            score_GNE = self._limit_groups(score_GNE)
        expert_GNK = _best(score_GNE, self.chosen)
        gate_GNK = prob_GNE.gather(-1, expert_GNK)
        if self.normalise:
            gate_GNK = gate_GNK / (gate_GNK.sum(-1, keepdim=True) + 1e-9)
        if self.moe.routed_scaling_factor != 1.0:
            gate_GNK = gate_GNK * self.moe.routed_scaling_factor
        return gate_GNK, expert_GNK

    def _limit_groups(self, score_GNE: Tensor) -> Tensor:
        """Scores with the experts outside the best ``topk_group`` groups at minus infinity."""
        G, N, E = score_GNE.shape
        parts, kept = self.moe.n_group or 1, self.moe.topk_group or 1
        by_group = score_GNE.reshape(G, N, parts, E // parts)
        best = by_group.sort(-1, descending=True).values
        group_score = best[..., : 2 if self.moe.topk_method == "noaux_tc" else 1].sum(-1)
        limit = group_score.sort(-1, descending=True).values[..., kept - 1 : kept]
        inside = (group_score >= limit).unsqueeze(-1)
        return torch.where(inside, by_group, by_group.new_full((), -3.0e38)).reshape(G, N, E)

    def _kept(self, expert_GNK: Tensor, counts_GE: Tensor) -> Tensor:
        """(G, N, K) bool: the first C assignments of every expert, in drop order."""
        _, N, _ = expert_GNK.shape
        capacity = expert_capacity(self.chosen, N, self.moe.capacity_factor, self.experts, self.multiple)
        kept = positions(self._drop_order(expert_GNK), counts_GE) < capacity
        if self.moe.enable_sdrop:
            return kept.view(expert_GNK.shape)
        return kept.view(-1, self.chosen, N).transpose(1, 2)

    def _drop_order(self, x_GNK: Tensor) -> Tensor:
        """(G, N, K) -> (G, kN): all first choices first (kdrop), or token after token (sdrop)."""
        return (x_GNK if self.moe.enable_sdrop else x_GNK.transpose(1, 2)).flatten(1)

    def _auxiliary(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor) -> Tensor:
        """All auxiliary losses; with a bias the load is that of the unbiased choice."""
        if self.moe.use_gating_sigmoid:
            prob_GNE = prob_GNE / (prob_GNE.sum(-1, keepdim=True) + 1e-9)
        if self.moe.balance_via_topk_bias and self.aux_loss.balances:
            counts_GE = _counts(_best(prob_GNE.detach(), self.chosen), self.experts)
        return self.aux_loss(logits_GNE, prob_GNE, counts_GE.to(torch.float32))


def positions(expert_GT: Tensor, counts_GE: Tensor) -> Tensor:
    """Place (G, kN) of every assignment inside its expert, from 0, in the given order; counts (G, E) int64."""
    sorted_GT, order_GT = torch.sort(expert_GT, dim=-1, stable=True)
    starts_GE = counts_GE.cumsum(-1) - counts_GE
    place_T = torch.arange(expert_GT.shape[1], device=expert_GT.device)
    return torch.empty_like(order_GT).scatter_(1, order_GT, place_T - starts_GE.gather(1, sorted_GT))


def _best(score_GNE: Tensor, count: int) -> Tensor:
    """Experts (G, N, count) of the highest scores; of equal ones the lower number (topk keeps to no rule)."""
    return torch.sort(score_GNE, dim=-1, descending=True, stable=True).indices[..., :count]


def _counts(expert_GNK: Tensor, experts: int) -> Tensor:
    """Assignments (G, E) int64 of each expert."""
    flat = expert_GNK.flatten(1)
    return torch.zeros(flat.shape[0], experts, dtype=torch.int64, device=flat.device).scatter_add_(
        1, flat, torch.ones_like(flat)
    )
