# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE's residual experts (Zhu et al. 2024, arXiv:2406.16554): every token passes them all, each is weighed.

The sum of E experts times a score each is one feed-forward as wide as all of them, whose hidden values are multiplied
by the score of the expert that they belong to: one product in, one out, cut over devices like any feed-forward.
"""

from __future__ import annotations

import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import SharedExpertSpec
from mindformers_ext.ms.moe.rows import scaled_rows
from mindformers_ext.ms.ops.portable import outer_product
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class ExpertScores(nn.Cell):
    """What experts are multiplied by. Input: logits (T, E) float32; output of the same shape and type."""

    def __init__(self, experts: int, softmax: bool, multiply: bool, scale: float) -> None:
        super().__init__()
        self.experts, self.softmax, self.multiply, self.scale = experts, softmax, multiply, scale
        self.weigh = P.Softmax(axis=-1)

    def construct(self, logits_TE: Tensor) -> Tensor:
        if not self.multiply:  # a gate that changes nothing keeps its place in the graph
            return logits_TE * 0.0 + 1.0
        if self.softmax:  # of one it is always 1: see ms.moe.gate.TopkChoice
            logits_TE = self.weigh(logits_TE) if self.experts > 1 else ops.ones_like(logits_TE)
        return logits_TE * self.scale


class WeighedExperts(nn.Cell):
    """Hidden values times the score of their expert. Inputs: hidden (T, F), logits (T, E) float32. Output (T, F)."""

    def __init__(self, shared: SharedExpertSpec, shards: Shards, operators: Operators) -> None:
        super().__init__()
        forms = shared.num_experts, shared.gate_use_softmax, shared.multiply_gate_scores, shared.scale_of(0)
        self.scores = shards.local(operators.build(ExpertScores, *forms), "scaled rows")
        one_hot_FE = np.repeat(np.eye(shared.num_experts, dtype=np.float32), shared.sizes_of(0), axis=0)
        self.expert_FE = Tensor(one_hot_FE)
        self.spread = shards.shard(P.MatMul(transpose_b=True), "spread scores")
        self.multiply = shards.shard(P.Mul(), "weighed hidden")

    def construct(self, hidden_TF: Tensor, logits_TE: Tensor) -> Tensor:
        score_TE = ops.cast(self.scores(logits_TE), hidden_TF.dtype)
        return self.multiply(hidden_TF, self.spread(score_TE, ops.cast(self.expert_FE, hidden_TF.dtype)))


class MeanRows(nn.Cell):
    """Rows weighed by the softmax of two logits. Inputs: rows (T, D) twice, logits (T, 2) float32; output (T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.outer = P.Sigmoid(), outer_product()

    def construct(self, first_TD: Tensor, second_TD: Tensor, logits_T2: Tensor) -> Tensor:
        apart_T = logits_T2[:, 0:1] - logits_T2[:, 1:2]
        share_T = ops.cast(self.sigmoid(apart_T), first_TD.dtype)
        rest_T = ops.cast(self.sigmoid(-apart_T), first_TD.dtype)
        return scaled_rows(first_TD, share_T, self.outer) + scaled_rows(second_TD, rest_T, self.outer)
