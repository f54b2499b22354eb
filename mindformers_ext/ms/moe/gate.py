# SPDX-License-Identifier: Apache-2.0
"""Gates: they score experts, choose some for every token, weigh them, and have a loss. They know no slots.

``GATES`` builds them by ``MoESpec.gate``; what a gate holds stands in ``core.families.GATES`` and is named below
``router.`` as there. Between ``scores`` and the rest runs a border: ``scores`` has the weights, and on many devices its
operators are cut like any other; the rest sees the tokens of one routing group G alone and is one operator together
with the slot rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.aux_loss import AuxiliaryLoss
from mindformers_ext.ms.moe.order import ExpertOrder
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards

# expert (G, N, K) int32 and weight (G, N, K) float32, best first, and the probabilities (G, N, E) that the loss takes;
# of a gate by threshold the expert of an empty place is E.
# A plain tuple: MindSpore's graphs know no named ones.
Choice = tuple[Tensor, Tensor, Tensor]


class Gate(Protocol):
    """What a mixture asks of its gate."""

    def scores(self, x_TD: Tensor) -> Tensor:
        """(T, S) float32 of rows (T, D); S is the gate's own affair."""

    def noisy_scores(self, x_TD: Tensor, noise_TE: Tensor) -> Tensor:
        """The same of a training step, with what the gate needs of the noise; asked of gates that add it."""

    def bias(self) -> Tensor:
        """(E) float32 that moves the choice between steps, not by gradients; zeros where nothing does."""

    def choose(self, scores_GNS: Tensor, bias_E: Tensor) -> Choice:
        """Experts and weights of each token from its scores, by groups of N tokens."""

    def loss(self, scores_GNS: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None) -> Tensor:
        """The auxiliary loss of every group (G); ``counts_GE`` float32: assignments per expert before dropping, of the
        tokens that count; ``counted_GN``: 1 for those, 0 for others, None where all do."""


class RouterGate(nn.Cell):
    """Router logits: x Wg^T in the router's type (float32 unless asked). Weight (E, D), no bias."""

    def __init__(self, hidden: int, experts: int, std: float, router_dtype: ms.Type) -> None:
        super().__init__()
        start = initializer(Normal(sigma=std) if std else "zeros", (experts, hidden), ms.float32)
        # small: kept whole on every device, as MindFormers does; cutting it would cost a gather more per layer
        self.weight = Parameter(start, name="weight", parallel_optimizer=False)
        self.dtype = router_dtype
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x_TD: Tensor) -> Tensor:
        return ops.cast(self.product(ops.cast(x_TD, self.dtype), ops.cast(self.weight, self.dtype)), ms.float32)


class TopkChoice(nn.Cell):
    """Chooses by probability, as MindFormers' ``TopkRouterV2`` does (DeepSeek-V2 section 2.2 for group limits;
    DeepSeek-V3 section 2.1 for the bias). ``choose``, ``bias`` and ``loss`` of ``Gate``, with logits as scores.

    ``expert_parallel``: parts of the "comm" loss.
    """

    def __init__(self, moe: MoESpec, expert_parallel: int = 1) -> None:
        super().__init__()
        self.moe = moe
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
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
        self.aux_loss = AuxiliaryLoss(moe, expert_parallel)
        self.order = ExpertOrder(self.experts)
        self.softmax = P.Softmax(axis=-1)
        self.topk = P.TopK(sorted=True)

    def bias(self) -> Tensor:
        """A parameter, or zeros that nothing reads."""
        return self.topk_bias if self.biased else self.no_bias

    def choose(self, logits_GNE: Tensor, bias_E: Tensor) -> Choice:
        """See ``Gate``."""
        prob_GNE = self._probabilities(logits_GNE)
        weight_GNK, expert_GNK = self._best(prob_GNE, bias_E)
        if self.normalise:
            weight_GNK = weight_GNK / (weight_GNK.sum(-1, keepdims=True) + 1e-9)
        if self.moe.routed_scaling_factor != 1.0:
            weight_GNK = weight_GNK * self.moe.routed_scaling_factor
        return expert_GNK, weight_GNK, prob_GNE

    def loss(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None) -> Tensor:
        """All auxiliary losses (G); with a bias the load is that of the unbiased choice."""
        if self.sigmoid:
            prob_GNE = prob_GNE / (prob_GNE.sum(-1, keepdims=True) + 1e-9)
        if self.biased and self.aux_loss.balances:
            _, expert_GNK = self.topk(ops.stop_gradient(prob_GNE), self.chosen)
            if counted_GN is None:
                _, _, counts_GE, _ = self.order(ops.reshape(expert_GNK, (expert_GNK.shape[0], -1)))
                counts_GE = ops.cast(counts_GE, ms.float32)
            else:
                counts_GE = counted_assignments(expert_GNK, counted_GN, self.experts)
        return self.aux_loss.per_group(logits_GNE, prob_GNE, counts_GE, counted_GN)

    def _probabilities(self, logits_GNE: Tensor) -> Tensor:
        if self.sigmoid:
            return ops.sigmoid(logits_GNE)
        if self.single_expert:
            # Always 1. Not only cheaper: in PYNATIVE, MindSpore 2.9 keeps the gradient it has traced for Softmax over
            # an axis of length 1, which needs no sum, and uses it for every later Softmax of the process.
            return ops.ones_like(logits_GNE)
        return self.softmax(logits_GNE)

    def _best(self, prob_GNE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and experts (G, N, K) of each token; the bias and the group limit choose, they never weigh."""
        if not self.biased and not self.grouped:
            return self.topk(prob_GNE, self.chosen)
        score_GNE = ops.stop_gradient(prob_GNE)
        if self.biased:
            score_GNE = score_GNE + bias_E
        if self.grouped:
            score_GNE = self._limit_groups(score_GNE)
        _, index_GNK = self.topk(score_GNE, self.chosen)
        return ops.gather_elements(prob_GNE, -1, index_GNK), index_GNK

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


class LinearGate(nn.Cell):
    """Logits by one linear product, then ``TopkChoice``; MindFormers' names ``dense.weight``, ``router.topk_bias``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        model, router_dtype = spec.model, operators.router_dtype(moe.router_dtype)
        self.dense = RouterGate(model.hidden_size, moe.num_local_experts, model.initializer_range, router_dtype)
        self.dense.product = Shards(spec).shard(self.dense.product, "gate")
        if moe.balance_via_topk_bias:  # then every layer has its own bias
            self.router = TopkChoice(moe, spec.parallel.expert_parallel)
        else:
            self.router = operators.build(TopkChoice, moe, spec.parallel.expert_parallel)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E)."""
        return self.dense(x_TD)

    def bias(self) -> Tensor:
        """See ``Gate``."""
        return self.router.bias()

    def choose(self, logits_GNE: Tensor, bias_E: Tensor) -> Choice:
        """See ``Gate``."""
        return self.router.choose(logits_GNE, bias_E)

    def loss(self, logits_GNE: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None) -> Tensor:
        """See ``Gate``."""
        return self.router.loss(logits_GNE, prob_GNE, counts_GE, counted_GN)


def counted_assignments(expert_GNK: Tensor, counted_GN: Tensor, experts: int) -> Tensor:
    """Assignments (G, E) float32 of the tokens that count (G, N), 1 or 0."""
    number_E = ops.reshape(ops.arange(experts, dtype=ms.int32), (1, 1, 1, -1))
    chosen_GNE = ops.cast(ops.expand_dims(expert_GNK, -1) == number_E, ms.float32).sum(2)
    return (chosen_GNE * ops.expand_dims(counted_GN, -1)).sum(1)


GATES: dict[str, Callable[[NetworkSpec, MoESpec, Operators], Gate]] = {"linear": LinearGate}


def build_gate(spec: NetworkSpec, moe: MoESpec, operators: Operators) -> Gate:
    """The gate that ``moe.gate`` names, with fresh random weights."""
    return GATES[moe.gate](spec, moe, operators)
