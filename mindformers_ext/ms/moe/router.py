# SPDX-License-Identifier: Apache-2.0
"""Top-k routing with capacity: MindFormers' ``TopkRouterV2``, in integers and for any number of tokens.

One routing group G per data-parallel slice; every tensor keeps it as its first axis. The position of an assignment
inside its expert comes from one sort of unique int32 keys ``expert * kN + order``: O(kN) memory, exact while
``E * kN < 2**31`` (MindFormers' float32 one-hot cumulative sum needs O(kNE) and is exact only below 2**24).
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops.auto_generate import TensorToScalar

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.spec import MoESpec, ParallelSpec
from mindformers_ext.ms.moe.aux_loss import AuxiliaryLoss

_INT32_LIMIT = 2**31


class ExpertOrder(nn.Cell):
    """Sorts assignments by expert, keeping their drop order inside each expert.

    Input: expert of each assignment in drop order (G, kN) int32. Outputs: the drop-order ids sorted by expert
    (G, kN), position of every assignment inside its expert (G, kN) from 0, counts (G, E), starts (G, E); all int32.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.first_E = Tensor(np.arange(experts, dtype=np.int32)[None])
        self.sort = P.Sort()
        self.gather = P.Gather(batch_dims=1)

    def construct(self, expert_GT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        G, kN = expert_GT.shape
        order_T = ops.reshape(Tensor(np.arange(kN, dtype=np.int32)), (1, kN))
        keys, _ = self.sort(expert_GT * kN + order_T)
        first_key_GE = ops.tile(self.first_E * kN, (G, 1))
        starts_GE = ops.searchsorted(keys, first_key_GE, out_int32=True)
        counts_GE = ops.searchsorted(keys, first_key_GE + kN, out_int32=True) - starts_GE
        sorted_GT = keys % kN
        # The ids are a permutation: the places that sort them back are the ranks.
        _, rank_GT = self.sort(sorted_GT)
        position_GT = rank_GT - self.gather(starts_GE, expert_GT, 1)
        return sorted_GT, position_GT, counts_GE, starts_GE


class TopkRouterV2(nn.Cell):
    """Chooses experts and slots (GShard; DeepSeek-V2 section 2.2 for group limits; DeepSeek-V3 2.1 for the bias).

    Input: logits (G, N, E) float32. Outputs:
      dispatch (G, E, C) int32: 1 + token of each slot, 0 = empty;
      combine (G, N, K) int32: expert * (1 + C) + 1 + position, position part 0 = dropped (the zero slot);
      coeff (G, N, K) float32: gate, 0 where dropped;
      assignment (G, E, C) int32: token * K + choice of each slot (of the first token for an empty one);
      aux_loss () float32, load (E) float32: assignments per expert before dropping, dropped () float32: their share.

    ``reference_capacity`` reproduces MindFormers' dropless capacity, which is one multiple larger than needed.
    ``slots``: constructor of a fused kernel that fills the slots of a fixed capacity (``ms.ops.ascend``); without one,
    and wherever the capacity follows the load, assignments are sorted.
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
        self.moe = moe
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.multiple = parallel.router_model_parallel * moe.comp_comm_parallel_degree
        self.dropless = moe.capacity_factor <= 0
        self.drops_only_in_training = False  # set by whoever evaluates with the training network (mf)
        self.spare = 1 if reference_capacity else 0
        self.sequence_order = moe.enable_sdrop
        self.sigmoid = moe.use_gating_sigmoid
        self.single_expert = self.experts == 1
        self.normalise = moe.norm_topk_prob and (self.chosen > 1 or moe.norm_single_choice)
        self.grouped = moe.topk_method != "greedy"
        self.group_by_two = moe.topk_method == "noaux_tc"
        self.biased = moe.balance_via_topk_bias
        zeros = Tensor(np.zeros(self.experts, np.float32))
        self.no_bias = zeros
        if self.biased:
            self.topk_bias = Parameter(zeros, name="topk_bias", requires_grad=False, parallel_optimizer=False)
        self.aux_loss = AuxiliaryLoss(moe, parallel.expert_parallel)
        self.order = ExpertOrder(self.experts)
        self.has_kernel = slots is not None
        self.kernel = slots(self.experts, self.chosen, self.sequence_order) if slots else self.order
        self.softmax = P.Softmax(axis=-1)
        self.topk = P.TopK(sorted=True)
        self.transpose = P.Transpose()
        self.gather = P.Gather(batch_dims=1)
        self.to_scalar = TensorToScalar()

    def _limit_groups(self, score_GNE: Tensor) -> Tensor:
        """Scores with the experts outside the best ``topk_group`` groups at minus infinity."""
        G, N, E = score_GNE.shape
        groups = self.moe.n_group
        by_group = ops.reshape(score_GNE, (G, N, groups, E // groups))
        best, _ = self.topk(by_group, 2 if self.group_by_two else 1)
        group_score = best.sum(-1)
        top, _ = self.topk(group_score, self.moe.topk_group)
        kept = ops.expand_dims(group_score >= top[:, :, -1:], -1)
        limited = ops.select(ops.broadcast_to(kept, by_group.shape), by_group, ops.full_like(by_group, -3.0e38))
        return ops.reshape(limited, (G, N, E))

    def bias(self) -> Tensor:
        """The bias of the choice (E): a parameter, or zeros that nothing reads."""
        return self.topk_bias if self.biased else self.no_bias

    def _choose(self, prob_GNE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and experts (G, N, K) of each token; the bias and the group limit choose, they never weigh."""
        if not self.biased and not self.grouped:
            return self.topk(prob_GNE, self.chosen)
        score_GNE = ops.stop_gradient(prob_GNE)
        if self.biased:
            score_GNE = score_GNE + bias_E
        if self.grouped:
            score_GNE = self._limit_groups(score_GNE)
        _, index_GNK = self.topk(score_GNE, self.chosen)
        return ops.gather_elements(prob_GNE, -1, index_GNK), index_GNK

    def _gates(self, prob_GNE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        gate_GNK, index_GNK = self._choose(prob_GNE, bias_E)
        if self.normalise:
            gate_GNK = gate_GNK / (gate_GNK.sum(-1, keepdims=True) + 1e-9)
        if self.moe.routed_scaling_factor != 1.0:
            gate_GNK = gate_GNK * self.moe.routed_scaling_factor
        return gate_GNK, index_GNK

    def _capacity(self, tokens: int, counts_GE: Tensor) -> int:
        """Slots per expert: fixed by the factor, or the largest load rounded up when dropless."""
        if self._is_fixed():
            moe = self.moe
            return expert_capacity(self.chosen, tokens, moe.capacity_factor, self.experts, self.multiple)
        largest = self.to_scalar(ops.cast(counts_GE.max(), ms.int64))
        if self.spare:
            return (largest // self.multiple + 1) * self.multiple
        return (largest + self.multiple - 1) // self.multiple * self.multiple

    def _is_fixed(self) -> bool:
        """Whether the capacity follows from the number of tokens alone."""
        return not self.dropless and (self.training or not self.drops_only_in_training)

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

    def _slots(self, sorted_GT: Tensor, counts_GE: Tensor, starts_GE: Tensor, capacity: int, tokens: int) -> tuple:
        """dispatch and assignment (G, E, C) of the first ``capacity`` assignments of every expert."""
        G, kN = sorted_GT.shape
        place_C = ops.reshape(ops.arange(0, capacity, 1, dtype=ms.int32), (1, 1, -1))
        rank = ops.minimum(ops.expand_dims(starts_GE, -1) + place_C, kN - 1)
        filled = ops.cast(place_C < ops.expand_dims(counts_GE, -1), ms.int32)
        order_GEC = self.gather(sorted_GT, rank, 1)
        if self.sequence_order:
            return (order_GEC // self.chosen + 1) * filled, order_GEC * filled
        token = order_GEC % tokens
        return (token + 1) * filled, (token * self.chosen + order_GEC // tokens) * filled

    def choose(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (G, N, K) float32 and experts (G, N, K) int32 of each token, before any slot is given: inference."""
        return self._gates(self._probabilities(logits_GNE), self.bias())

    def construct(self, logits_GNE: Tensor) -> tuple:
        dispatch, combine, coeff, assignment, aux_loss_G, counts_GE, dropped_G = self.route(logits_GNE, self.bias())
        return dispatch, combine, coeff, assignment, aux_loss_G.mean(), counts_GE.sum(0), dropped_G.mean()

    def route(self, logits_GNE: Tensor, bias_E: Tensor) -> tuple:
        """As ``construct`` with the bias given, and the last three per group: (G), (G, E) and (G)."""
        G, N, E = logits_GNE.shape
        _check_load(self.chosen * N, E, self.moe.max_router_load)
        prob_GNE = self._probabilities(logits_GNE)
        gate_GNK, index_GNK = self._gates(prob_GNE, bias_E)
        index_GNK = ops.stop_gradient(index_GNK)
        if self.has_kernel and self._is_fixed():
            dispatch_GEC, combine_GNK, kept_GNK, assignment_GEC, counts_GE = self._place_by_kernel(index_GNK)
        else:
            dispatch_GEC, combine_GNK, kept_GNK, assignment_GEC, counts_GE = self._place(index_GNK)
        counts_GE = ops.cast(counts_GE, ms.float32)
        aux_loss_G = self._auxiliary(logits_GNE, prob_GNE, counts_GE)
        dropped_G = 1.0 - ops.reshape(kept_GNK, (G, -1)).sum(-1) / (self.chosen * N)
        return dispatch_GEC, combine_GNK, gate_GNK * kept_GNK, assignment_GEC, aux_loss_G, counts_GE, dropped_G

    def _place(self, index_GNK: Tensor) -> tuple:
        """dispatch, combine, kept (G, N, K) float32 of 0 or 1, assignment, counts (G, E) int32, by sorting."""
        N = index_GNK.shape[1]
        expert_GT = self._drop_order(index_GNK)
        sorted_GT, position_GT, counts_GE, starts_GE = self.order(expert_GT)
        capacity = self._capacity(N, counts_GE)
        dispatch_GEC, assignment_GEC = self._slots(sorted_GT, counts_GE, starts_GE, capacity, N)
        kept_GT = position_GT < capacity
        slot_GT = expert_GT * (capacity + 1) + (position_GT + 1) * ops.cast(kept_GT, ms.int32)
        kept_GNK = self._token_order(ops.cast(kept_GT, ms.float32), N)
        return dispatch_GEC, self._token_order(slot_GT, N), kept_GNK, assignment_GEC, counts_GE

    def _place_by_kernel(self, index_GNK: Tensor) -> tuple:
        """As ``_place``, of a fixed capacity."""
        counts_GE = self.kernel.counts(index_GNK)
        capacity = self._capacity(index_GNK.shape[1], counts_GE)
        dispatch_GEC, combine_GNK, assignment_GEC = self.kernel(index_GNK, capacity)
        kept_GNK = ops.cast(combine_GNK % (capacity + 1) > 0, ms.float32)
        return dispatch_GEC, combine_GNK, kept_GNK, assignment_GEC, counts_GE

    def sorted_rows(self, logits_GNE: Tensor, bias_E: Tensor) -> tuple:
        """For experts without slots: gates (G, N, K), assignments token * K + choice sorted by expert (G, kN) int32,
        the place of each assignment among them (G, N, K) int32, the end of each expert's part (G, E) int32, and
        aux_loss (G), counts (G, E) float32."""
        G, N, E = logits_GNE.shape
        _check_load(self.chosen * N, E, self.moe.max_router_load)
        prob_GNE = self._probabilities(logits_GNE)
        gate_GNK, index_GNK = self._gates(prob_GNE, bias_E)
        expert_GT = ops.reshape(ops.stop_gradient(index_GNK), (G, -1))
        sorted_GT, position_GT, counts_GE, starts_GE = self.order(expert_GT)
        place_GNK = ops.reshape(position_GT + self.gather(starts_GE, expert_GT, 1), (G, N, -1))
        load_GE = ops.cast(counts_GE, ms.float32)
        aux_loss_G = self._auxiliary(logits_GNE, prob_GNE, load_GE)
        return gate_GNK, sorted_GT, place_GNK, starts_GE + counts_GE, aux_loss_G, load_GE

    def _probabilities(self, logits_GNE: Tensor) -> Tensor:
        if self.sigmoid:
            return ops.sigmoid(logits_GNE)
        if self.single_expert:
            # Always 1. Not only cheaper: in PYNATIVE, MindSpore 2.9 keeps the gradient it has traced for Softmax over
            # an axis of length 1, which needs no sum, and uses it for every later Softmax of the process.
            return ops.ones_like(logits_GNE)
        return self.softmax(logits_GNE)

    def _auxiliary(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor) -> Tensor:
        """All auxiliary losses; with a bias the load is that of the unbiased choice."""
        if self.sigmoid:
            prob_GNE = prob_GNE / (prob_GNE.sum(-1, keepdims=True) + 1e-9)
        if self.biased and self.aux_loss.balances:
            _, index_GNK = self.topk(ops.stop_gradient(prob_GNE), self.chosen)
            counts_GE = ops.cast(self._counts(index_GNK), ms.float32)
        return self.aux_loss.per_group(logits_GNE, prob_GNE, counts_GE)

    def _counts(self, index_GNK: Tensor) -> Tensor:
        """Assignments per expert (G, E) int32."""
        if self.has_kernel:
            return self.kernel.counts(index_GNK)
        _, _, counts_GE, _ = self.order(self._drop_order(index_GNK))
        return counts_GE


def _check_load(assignments: int, experts: int, max_router_load: int) -> None:
    """Refuse sizes that the integer keys, or the user's own limit, do not hold."""
    if assignments > max_router_load:
        raise ValueError(
            f"{assignments} assignments per routing group exceed max_router_load={max_router_load}: "
            "raise moe_config.max_router_load or shorten the batch"
        )
    if experts * assignments >= _INT32_LIMIT:
        raise ValueError(f"{experts} experts x {assignments} assignments do not fit 32-bit keys: use more groups")
