# SPDX-License-Identifier: Apache-2.0
"""Slot rules: which place every assignment gets, and which get none. They know no gate.

A slot is one row that an expert computes. ``CapacitySlots`` gives every expert as many (GShard, Lepikhin et al. 2020,
section 3.2); ``SortedSlots`` gives each what its tokens need, expert after expert; ``FilledSlots`` gives none to the
empty places of a gate by threshold. Every routing group G for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import TensorToScalar

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.order import ExpertOrder, check_load
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards

# dispatch (G, E, C) int32: 1 + token of each slot, 0 = empty;
# slot (G, N, K) int32: flat E*C index of each assignment, 0 where it is dropped;
# kept (G, N, K) float32: 1, or 0 where it is dropped;
# assignment (G, E, C) int32: token * K + choice of each slot (of the first token for an empty one);
# counts (G, E) float32: assignments per expert before dropping; dropped (G) float32: their share.
# Sorted slots have no E: (G, 1, T) stands for (G, E, C). A plain tuple: MindSpore's graphs know no named ones.
Slots = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class SlotRule(Protocol):
    """What a mixture asks of its rule."""

    def __call__(self, expert_GNK: Tensor) -> Slots:
        """Places for the experts (int32) of each token."""

    def shape(self, tokens: int) -> list[int]:
        """(E, C) of a group of ``tokens``, where it follows from their number alone; MindSpore's cut graph asks."""

    def keep_all_in_evaluation(self) -> None:
        """Drop in training only."""


class CapacitySlots(nn.Cell):
    """Slots of one number for all experts: MindFormers' ``TopkRouterV2``, in integers and for any number of tokens.

    Args:
        moe: capacity and drop order.
        multiple: capacities are multiples of it.
        spare: multiples more when dropless; 1 reproduces MindFormers, which has one more than it needs.
        kernel: constructor of a fused kernel that fills the slots of a fixed capacity (``ms.ops.ascend``); without one,
            and wherever the capacity follows the load, assignments are sorted.
    """

    def __init__(
        self, moe: MoESpec, multiple: int = 1, spare: int = 0, kernel: Callable[..., nn.Cell] | None = None
    ) -> None:
        super().__init__()
        self.moe, self.multiple, self.spare = moe, multiple, spare
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.dropless = moe.capacity_factor <= 0
        self.drops_only_in_training = False
        self.sequence_order = moe.enable_sdrop
        self.order = ExpertOrder(self.experts)
        self.has_kernel = kernel is not None
        self.kernel = kernel(self.experts, self.chosen, self.sequence_order) if kernel else self.order
        self.transpose = P.Transpose()
        self.gather = P.Gather(batch_dims=1)
        self.to_scalar = TensorToScalar()

    def keep_all_in_evaluation(self) -> None:
        """See ``SlotRule``."""
        self.drops_only_in_training = True

    def shape(self, tokens: int) -> list[int]:
        """See ``SlotRule``."""
        return [self.experts, self._fixed_capacity(tokens)]

    def construct(self, expert_GNK: Tensor) -> Slots:
        G, N, _ = expert_GNK.shape
        check_load(self.chosen * N, self.experts, self.moe.max_router_load)
        if self.has_kernel and self._is_fixed():
            dispatch_GEC, slot_GNK, kept_GNK, assignment_GEC, counts_GE = self._by_kernel(expert_GNK)
        else:
            dispatch_GEC, slot_GNK, kept_GNK, assignment_GEC, counts_GE = self._by_sorting(expert_GNK)
        dropped_G = 1.0 - ops.reshape(kept_GNK, (G, -1)).sum(-1) / (self.chosen * N)
        return dispatch_GEC, slot_GNK, kept_GNK, assignment_GEC, ops.cast(counts_GE, ms.float32), dropped_G

    def _is_fixed(self) -> bool:
        """Whether the capacity follows from the number of tokens alone."""
        return not self.dropless and (self.training or not self.drops_only_in_training)

    def _fixed_capacity(self, tokens: int) -> int:
        return expert_capacity(self.chosen, tokens, self.moe.capacity_factor, self.experts, self.multiple)

    def _capacity(self, tokens: int, counts_GE: Tensor) -> int:
        """Slots per expert: fixed by the factor, or the largest load rounded up when dropless."""
        if self._is_fixed():
            return self._fixed_capacity(tokens)
        largest = self.to_scalar(ops.cast(counts_GE.max(), ms.int64))
        if self.spare:
            return (largest // self.multiple + self.spare) * self.multiple
        return (largest + self.multiple - 1) // self.multiple * self.multiple

    def _drop_order(self, x_GNK: Tensor) -> Tensor:
        """(G, N, K) -> (G, kN): all first choices first (kdrop), or token after token (sdrop)."""
        if self.sequence_order:
            return ops.reshape(x_GNK, (x_GNK.shape[0], -1))
        return ops.reshape(self.transpose(x_GNK, (0, 2, 1)), (x_GNK.shape[0], -1))

    def _token_order(self, x_GT: Tensor, tokens: int) -> Tensor:
        """The inverse of ``_drop_order``."""
        if self.sequence_order:
            return ops.reshape(x_GT, (-1, tokens, self.chosen))
        return self.transpose(ops.reshape(x_GT, (-1, self.chosen, tokens)), (0, 2, 1))

    def _by_sorting(self, expert_GNK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        N = expert_GNK.shape[1]
        expert_GT = self._drop_order(expert_GNK)
        sorted_GT, position_GT, counts_GE, starts_GE = self.order(expert_GT)
        capacity = self._capacity(N, counts_GE)
        dispatch_GEC, assignment_GEC = self._filled(sorted_GT, counts_GE, starts_GE, capacity, N)
        kept_GT = position_GT < capacity
        slot_GT = (expert_GT * capacity + position_GT) * ops.cast(kept_GT, ms.int32)
        kept_GNK = self._token_order(ops.cast(kept_GT, ms.float32), N)
        return dispatch_GEC, self._token_order(slot_GT, N), kept_GNK, assignment_GEC, counts_GE

    def _filled(
        self, sorted_GT: Tensor, counts_GE: Tensor, starts_GE: Tensor, capacity: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """dispatch and assignment (G, E, C) of the first ``capacity`` assignments of every expert."""
        place_C = ops.reshape(ops.arange(0, capacity, 1, dtype=ms.int32), (1, 1, -1))
        rank = ops.minimum(ops.expand_dims(starts_GE, -1) + place_C, sorted_GT.shape[1] - 1)
        filled = ops.cast(place_C < ops.expand_dims(counts_GE, -1), ms.int32)
        order_GEC = self.gather(sorted_GT, rank, 1)
        if self.sequence_order:
            return (order_GEC // self.chosen + 1) * filled, order_GEC * filled
        token = order_GEC % tokens
        return (token + 1) * filled, (token * self.chosen + order_GEC // tokens) * filled

    def _by_kernel(self, expert_GNK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As ``_by_sorting``, of a fixed capacity. The kernel numbers one slot more per expert, for the dropped."""
        capacity = self._fixed_capacity(expert_GNK.shape[1])
        dispatch_GEC, combine_GNK, assignment_GEC = self.kernel(expert_GNK, capacity)
        kept_GNK = combine_GNK % (capacity + 1) > 0
        slot_GNK = (combine_GNK - expert_GNK - 1) * ops.cast(kept_GNK, ms.int32)
        counts_GE = self.kernel.counts(expert_GNK)
        return dispatch_GEC, slot_GNK, ops.cast(kept_GNK, ms.float32), assignment_GEC, counts_GE


class FilledSlots(CapacitySlots):
    """Slots of one number for all experts, which is what the one with the most tokens needs; an assignment of expert E
    is an empty place, gets no slot and counts nowhere."""

    def __init__(self, moe: MoESpec, multiple: int = 1) -> None:
        super().__init__(moe, multiple)
        self.order = ExpertOrder(self.experts + 1)

    def construct(self, expert_GNK: Tensor) -> Slots:
        N = expert_GNK.shape[1]
        check_load(self.chosen * N, self.experts + 1, self.moe.max_router_load)
        expert_GT = self._drop_order(expert_GNK)
        sorted_GT, position_GT, counts_GE, starts_GE = self.order(expert_GT)
        counts_GE, starts_GE = counts_GE[:, : self.experts], starts_GE[:, : self.experts]
        capacity = self._capacity(N, ops.maximum(counts_GE, 1))  # of a slot or more: no operator is given nothing
        dispatch_GEC, assignment_GEC = self._filled(sorted_GT, counts_GE, starts_GE, capacity, N)
        filled_GT = ops.cast(expert_GT < self.experts, ms.int32)
        slot_GNK = self._token_order((expert_GT * capacity + position_GT) * filled_GT, N)
        kept_GNK = self._token_order(ops.cast(filled_GT, ms.float32), N)
        load_GE = ops.cast(counts_GE, ms.float32)
        return dispatch_GEC, slot_GNK, kept_GNK, assignment_GEC, load_GE, ops.zeros_like(load_GE[:, 0])


class SortedSlots(nn.Cell):
    """Slots without gaps: a slot is a place among the assignments sorted by expert, and none is dropped.

    ``spare``: one empty slot behind those of each expert, so that none has no rows, wherever it is.
    """

    def __init__(self, moe: MoESpec, spare: bool = False) -> None:
        super().__init__()
        self.moe = moe
        self.spare, self.join = spare, P.Concat(axis=1)
        self.every_1E = Tensor(np.arange(moe.num_local_experts, dtype=np.int32)[None])
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.order = ExpertOrder(self.experts)
        self.gather = P.Gather(batch_dims=1)

    def keep_all_in_evaluation(self) -> None:
        """Nothing is ever dropped."""

    def shape(self, tokens: int) -> list[int]:
        """See ``SlotRule``."""
        return [1, tokens * self.chosen + self.experts * self.spare]

    def construct(self, expert_GNK: Tensor) -> Slots:
        G, N, _ = expert_GNK.shape
        check_load(self.chosen * N, self.experts, self.moe.max_router_load, self.experts * self.spare)
        expert_GT, last = ops.reshape(expert_GNK, (G, -1)), self.chosen * N - 1
        placed_GT = self.join((expert_GT, ops.tile(self.every_1E, (G, 1)))) if self.spare else expert_GT
        sorted_GT, position_GT, counts_GE, starts_GE = self.order(placed_GT)
        slot_GT = position_GT + self.gather(starts_GE, placed_GT, 1)
        assignment_GET = ops.expand_dims(sorted_GT, 1)
        dispatch_GET = assignment_GET // self.chosen + 1
        if self.spare:
            slot_GT, counts_GE = slot_GT[:, : last + 1], counts_GE - 1
            filled_GET = ops.cast(assignment_GET <= last, ms.int32)
            dispatch_GET, assignment_GET = dispatch_GET * filled_GET, assignment_GET * filled_GET
        load_GE = ops.cast(counts_GE, ms.float32)
        kept_GNK, dropped_G = ops.ones_like(ops.cast(expert_GNK, ms.float32)), ops.zeros_like(load_GE[:, 0])
        return dispatch_GET, ops.reshape(slot_GT, (G, N, -1)), kept_GNK, assignment_GET, load_GE, dropped_G


def build_slots(spec: NetworkSpec, moe: MoESpec, operators: Operators) -> SlotRule:
    """The rule that ``moe`` asks for.

    Raises:
        UserError: experts chosen by a threshold in a network cut over devices, whose slots are of a fixed number.
    """
    if moe.use_gmm:
        return operators.build(SortedSlots, moe, Shards(spec).ep > 1)
    multiple = spec.parallel.router_model_parallel * moe.comp_comm_parallel_degree
    if moe.by_threshold:
        if Shards(spec).active:
            raise UserError("moe_gate 'threshold' is not cut over devices on MindSpore: use one device, or PyTorch")
        return operators.build(FilledSlots, moe, multiple)
    return operators.build(CapacitySlots, moe, multiple, 0, operators.slots)
