# SPDX-License-Identifier: Apache-2.0
"""Which assignments are kept: rules over what a gate has chosen, which know nothing of gates.

The position of an assignment inside its expert comes from one stable sort of expert numbers in drop order: O(kN)
memory, no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.pt.moe.gate import Choice


class Slots(NamedTuple):
    """kept (G, N, K) bool, None when nothing can be dropped; dropped (G) float32, the share that was dropped."""

    kept_GNK: Tensor | None
    dropped_G: Tensor


class SlotRule(Protocol):
    """Keeps some of the assignments (G, N, K) of a choice, whose number per expert is counts (G, E) int64."""

    def __call__(self, expert_GNK: Tensor, counts_GE: Tensor, training: bool) -> Slots: ...


@dataclass(frozen=True)
class CapacitySlots:
    """The first C assignments of every expert (GShard, Lepikhin et al. 2020, 3.2; ``core.capacity``).

    ``multiple``: what C is rounded up to. ``by_token``: in the order of tokens instead of all first choices first
    (MindFormers' sdrop and kdrop). ``only_in_training``: evaluation drops nothing.
    """

    factor: float
    multiple: int = 1
    by_token: bool = False
    only_in_training: bool = False

    def __call__(self, expert_GNK: Tensor, counts_GE: Tensor, training: bool) -> Slots:
        """See ``SlotRule``."""
        G, N, K = expert_GNK.shape
        if self.factor <= 0 or (self.only_in_training and not training):
            return Slots(None, torch.zeros(G, device=expert_GNK.device))
        capacity = expert_capacity(K, N, self.factor, counts_GE.shape[1], self.multiple)
        ordered_GT = (expert_GNK if self.by_token else expert_GNK.transpose(1, 2)).flatten(1)
        kept_GT = positions(ordered_GT, counts_GE) < capacity
        kept_GNK = kept_GT.view(G, N, K) if self.by_token else kept_GT.view(G, K, N).transpose(1, 2)
        return Slots(kept_GNK, 1.0 - kept_GNK.sum((1, 2)) / max(K * N, 1))


def build_slots(moe: MoESpec, parallel: ParallelSpec, only_in_training: bool = False) -> SlotRule:
    """The rule that a mixture's description asks for."""
    multiple = parallel.router_model_parallel * moe.comp_comm_parallel_degree
    return CapacitySlots(moe.capacity_factor, multiple, moe.enable_sdrop, only_in_training)


class Routing(NamedTuple):
    """A choice after dropping: what the experts compute and what the layer reports.

    expert_GNK (G, N, K) int64, best first; weight_GNK (G, N, K) float32, 0 where dropped; kept_GNK (G, N, K) bool,
    None when nothing can be dropped; aux_loss_G (G); counts_GE (G, E) float32 assignments before dropping, of tokens
    that count; dropped_G (G) float32 the share of all that was dropped.
    """

    expert_GNK: Tensor
    weight_GNK: Tensor
    kept_GNK: Tensor | None
    aux_loss_G: Tensor
    counts_GE: Tensor
    dropped_G: Tensor


def apply_slots(choice: Choice, rule: SlotRule, training: bool = True) -> Routing:
    """What a gate chose, as far as the rule keeps it."""
    slots, weight_GNK = rule(choice.expert_GNK, choice.counts_GE, training), choice.weight_GNK
    if slots.kept_GNK is not None:
        weight_GNK = torch.where(slots.kept_GNK, weight_GNK, weight_GNK.new_zeros(()))
    counts_GE = (choice.counts_GE if choice.reported_GE is None else choice.reported_GE).to(torch.float32)
    return Routing(choice.expert_GNK, weight_GNK, slots.kept_GNK, choice.aux_loss_G, counts_GE, slots.dropped_G)


def positions(expert_GT: Tensor, counts_GE: Tensor) -> Tensor:
    """Place (G, kN) of every assignment inside its expert, from 0, in the given order; counts (G, E) int64."""
    sorted_GT, order_GT = torch.sort(expert_GT, dim=-1, stable=True)
    starts_GE = counts_GE.cumsum(-1) - counts_GE
    place_T = torch.arange(expert_GT.shape[1], device=expert_GT.device)
    return torch.empty_like(order_GT).scatter_(1, order_GT, place_T - starts_GE.gather(1, sorted_GT))
