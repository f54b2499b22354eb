# SPDX-License-Identifier: Apache-2.0
"""Gates score experts, choose some for every token and have a loss of their own; they know nothing of slots.

``GATES`` holds one by each name of ``core.families.GATES``, with weights of the names that stand there. A routing group
G is the tokens of one data-parallel slice. "linear" is MindFormers' ``TopkRouterV2``: one linear product, whose
experts are those of the MindSpore engine. Of equal probabilities the lower expert number comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec
from mindformers_ext.pt.linear import fill_normal
from mindformers_ext.pt.moe.aux_loss import AuxiliaryLoss
from mindformers_ext.pt.ops.dtypes import torch_dtype


class Choice(NamedTuple):
    """What a gate decides.

    expert_GNK (G, N, K) int64, best first, and of a gate by threshold E where a place is empty; weight_GNK (G, N, K)
    float32; aux_loss_G (G) float32; counts_GE (G, E) int64 assignments of each expert; reported_GE those of tokens that
    count, None where all do.
    """

    expert_GNK: Tensor
    weight_GNK: Tensor
    aux_loss_G: Tensor
    counts_GE: Tensor
    reported_GE: Tensor | None = None


class Gate(Protocol):
    """A module over the tokens (G, N, D) of every routing group; one that draws noise takes it too, (T, E).

    ``counted_GN``: tokens that count in its loss and its report, None: all.
    """

    def __call__(self, x_GND: Tensor, noise_TE: Tensor | None = None, counted_GN: Tensor | None = None) -> Choice: ...

    def choose(self, x_GND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (G, N, K) float32 and experts (G, N, K), without losses and counts: inference."""


class RouterGate(nn.Module):
    """x W^T in the router's type. Input (T, in) of any type, output (T, out) and weight (out, in) float32, no bias."""

    def __init__(self, width_in: int, width_out: int, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.std, self.dtype = std, dtype
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh normal weights."""
        fill_normal(self.weight, self.std)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.to(self.dtype), self.weight.to(self.dtype)).float()


class LinearGate(nn.Module):
    """One linear product, then ``TopkChoice``: MindFormers' ``router.dense`` and ``router.router``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec) -> None:
        super().__init__()
        model, dtype = spec.model, torch_dtype(moe.router_dtype)
        self.dense = RouterGate(model.hidden_size, moe.num_local_experts, model.initializer_range, dtype)
        self.router = TopkChoice(moe, spec.parallel)

    def logits(self, x_GND: Tensor) -> Tensor:
        """(G, N, E) float32."""
        return self.dense(x_GND.flatten(0, 1)).view(*x_GND.shape[:2], -1)

    def forward(self, x_GND: Tensor, noise_TE: Tensor | None = None, counted_GN: Tensor | None = None) -> Choice:
        return self.router(self.logits(x_GND), counted_GN)

    def choose(self, x_GND: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Gate``."""
        return self.router.choose(self.logits(x_GND))


class TopkChoice(nn.Module):
    """Chooses experts as MindFormers' ``TopkRouterV2`` does (GShard, Lepikhin et al. 2020, 3.2; DeepSeek-V2 section 2.2
    for group limits; DeepSeek-V3 2.1 for the bias).

    Input: logits (G, N, E) float32; output: ``Choice``. ``topk_bias`` (E), where the spec has one, chooses and never
    weighs; it is moved by the training loop and is no parameter.
    """

    def __init__(self, moe: MoESpec, parallel: ParallelSpec | None = None) -> None:
        super().__init__()
        self.moe = moe
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.normalise = moe.norm_topk_prob and (self.chosen > 1 or moe.norm_single_choice)
        if moe.balance_via_topk_bias:
            self.register_buffer("topk_bias", torch.zeros(self.experts))
        self.aux_loss = AuxiliaryLoss(moe, parallel.expert_parallel if parallel else 1)

    def forward(self, logits_GNE: Tensor, counted_GN: Tensor | None = None) -> Choice:
        prob_GNE = self._probabilities(logits_GNE)
        weight_GNK, expert_GNK = self._weighted(prob_GNE)
        counts_GE, reported_GE = counted_assignments(expert_GNK, self.experts, counted_GN)
        loss_G = self._auxiliary(logits_GNE, prob_GNE, counts_GE if reported_GE is None else reported_GE, counted_GN)
        return Choice(expert_GNK, weight_GNK, loss_G, counts_GE, reported_GE)

    def choose(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (G, N, K) float32 and experts (G, N, K), nothing counted: inference."""
        return self._weighted(self._probabilities(logits_GNE))

    def _probabilities(self, logits_GNE: Tensor) -> Tensor:
        return torch.sigmoid(logits_GNE) if self.moe.use_gating_sigmoid else torch.softmax(logits_GNE, -1)

    def _weighted(self, prob_GNE: Tensor) -> tuple[Tensor, Tensor]:
        score_GNE = prob_GNE.detach()
        if self.moe.balance_via_topk_bias:
            score_GNE = score_GNE + self.topk_bias
        if self.moe.topk_method != "greedy":
            score_GNE = self._limit_groups(score_GNE)
        expert_GNK = best(score_GNE, self.chosen)
        weight_GNK = prob_GNE.gather(-1, expert_GNK)
        if self.normalise:
            weight_GNK = weight_GNK / (weight_GNK.sum(-1, keepdim=True) + 1e-9)
        if self.moe.routed_scaling_factor != 1.0:
            weight_GNK = weight_GNK * self.moe.routed_scaling_factor
        return weight_GNK, expert_GNK

    def _limit_groups(self, score_GNE: Tensor) -> Tensor:
        """Scores with the experts outside the best ``topk_group`` groups at minus infinity."""
        G, N, E = score_GNE.shape
        parts, kept = self.moe.n_group or 1, self.moe.topk_group or 1
        by_group = score_GNE.reshape(G, N, parts, E // parts)
        ordered = by_group.sort(-1, descending=True).values
        group_score = ordered[..., : 2 if self.moe.topk_method == "noaux_tc" else 1].sum(-1)
        limit = group_score.sort(-1, descending=True).values[..., kept - 1 : kept]
        inside = (group_score >= limit).unsqueeze(-1)
        return torch.where(inside, by_group, by_group.new_full((), -3.0e38)).reshape(G, N, E)

    def _auxiliary(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None) -> Tensor:
        """All auxiliary losses; with a bias the load is that of the unbiased choice."""
        if self.moe.use_gating_sigmoid:
            prob_GNE = prob_GNE / (prob_GNE.sum(-1, keepdim=True) + 1e-9)
        if self.moe.balance_via_topk_bias and self.aux_loss.balances:
            expert_GNK = best(prob_GNE.detach(), self.chosen)
            found = counted_assignments(expert_GNK, self.experts, counted_GN)
            counts_GE = found[0] if found[1] is None else found[1]
        return self.aux_loss(logits_GNE, prob_GNE, counts_GE.to(torch.float32), counted_GN)


def best(score_GNE: Tensor, count: int) -> Tensor:
    """Experts (G, N, count) of the highest scores; of equal ones the lower number (topk keeps to no rule)."""
    return torch.sort(score_GNE, dim=-1, descending=True, stable=True).indices[..., :count]


def count_assignments(expert_GNK: Tensor, experts: int, counted_GNK: Tensor | None = None) -> Tensor:
    """Assignments (G, E) int64 of each expert; where ``counted`` is given, those of which it is true."""
    flat = expert_GNK.flatten(1)
    ones = torch.ones_like(flat) if counted_GNK is None else counted_GNK.flatten(1).to(flat.dtype)
    return torch.zeros(flat.shape[0], experts, dtype=torch.int64, device=flat.device).scatter_add_(1, flat, ones)


def counted_assignments(expert_GNK: Tensor, experts: int, counted_GN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Assignments (G, E) int64 of all tokens, and of those that count where it is told."""
    counts_GE = count_assignments(expert_GNK, experts)
    if counted_GN is None:
        return counts_GE, None
    return counts_GE, count_assignments(expert_GNK, experts, counted_GN[..., None].expand_as(expert_GNK))


GATES: dict[str, Callable[[NetworkSpec, MoESpec], Gate]] = {"linear": LinearGate}


def build_gate(spec: NetworkSpec, moe: MoESpec) -> Gate:
    """The gate that a mixture's description names."""
    return GATES[moe.gate](spec, moe)
