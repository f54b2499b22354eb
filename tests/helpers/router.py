# SPDX-License-Identifier: Apache-2.0
"""Our choice and our slot rule as one cell with the outputs of MindFormers' ``TopkRouterV2``, to be judged by it."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.ms.moe.gate import TopkChoice
from mindformers_ext.ms.moe.slots import CapacitySlots


class TopkRouterV2(nn.Cell):
    """Input: logits (G, N, E) float32. Outputs:

    dispatch (G, E, C) int32: 1 + token of each slot, 0 = empty;
    combine (G, N, K) int32: expert * (1 + C) + 1 + position, position part 0 = dropped (the zero slot);
    coeff (G, N, K) float32: weight, 0 where dropped;
    assignment (G, E, C) int32: token * K + choice of each slot (of the first token for an empty one);
    aux_loss () float32, load (E) float32: assignments per expert before dropping, dropped () float32: their share.
    """

    def __init__(
        self,
        moe: MoESpec,
        parallel: ParallelSpec | None = None,
        reference_capacity: bool = False,
        slots: Callable[..., nn.Cell] | None = None,
    ) -> None:
        super().__init__()
        parallel = parallel or ParallelSpec()
        multiple = parallel.router_model_parallel * moe.comp_comm_parallel_degree
        self.choice = TopkChoice(moe, parallel.expert_parallel)
        self.slots = CapacitySlots(moe, multiple, int(reference_capacity), slots)

    @property
    def topk_bias(self) -> Parameter:
        return self.choice.topk_bias

    def bias(self) -> Tensor:
        return self.choice.bias()

    def choose(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts (G, N, K)."""
        expert_GNK, weight_GNK, _ = self.choice.choose(logits_GNE, self.choice.bias())
        return weight_GNK, expert_GNK

    def construct(self, logits_GNE: Tensor) -> tuple:
        dispatch, combine, coeff, assignment, aux_loss_G, counts_GE, dropped_G = self.route(logits_GNE, self.bias())
        return dispatch, combine, coeff, assignment, aux_loss_G.mean(), counts_GE.sum(0), dropped_G.mean()

    def route(self, logits_GNE: Tensor, bias_E: Tensor) -> tuple:
        """As ``construct`` with the bias given, and the last three per group: (G), (G, E) and (G)."""
        expert_GNK, weight_GNK, prob_GNE = self.choice.choose(logits_GNE, bias_E)
        expert_GNK = ops.stop_gradient(expert_GNK)
        dispatch, slot_GNK, kept_GNK, assignment, counts_GE, dropped_G = self.slots(expert_GNK)
        capacity = dispatch.shape[2]
        position_GNK = (slot_GNK - expert_GNK * capacity + 1) * ops.cast(kept_GNK, ms.int32)
        combine = expert_GNK * (capacity + 1) + position_GNK
        aux_loss_G = self.choice.loss(logits_GNE, prob_GNE, counts_GE)
        return dispatch, combine, weight_GNK * kept_GNK, assignment, aux_loss_G, counts_GE, dropped_G
