# SPDX-License-Identifier: Apache-2.0
"""The gate of LLaMA-MoE: logits of one or two layers, noise while training, the best K alone weighed, and a loss of
balance of its own (Shazeer et al. 2017, arXiv:1701.06538, appendix A; Zhu et al. 2024, arXiv:2406.16554).

Scores that cross the border of ``ms.moe.gate`` are the logits (E), or in a step with noise three in a row (3E): logits,
the size of the noise before softplus, the noise.
"""

from __future__ import annotations

import math

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.gate import GATES, Choice, RouterGate
from mindformers_ext.ms.ops.portable import SoftplusOp, TanhOp
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class NoisyChoice(nn.Cell):
    """``choose`` and ``loss`` of ``Gate``; what is handed from one to the other are the scores of the chosen at their
    experts (G, N, E), 0 elsewhere."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.softmax, self.multiply = moe.gate_use_softmax, moe.multiply_gate_scores
        self.factor, self.epsilon, self.balance = moe.scale_of(0), moe.gate_noise_epsilon, moe.balance_weight
        self.as_released = moe.load_compat == "reference"
        self.number_E = Tensor(np.arange(self.experts, dtype=np.int32)[None, None, None])
        self.divisor = float(max(self.experts - 1, 1))
        self.topk, self.weigh, self.softplus, self.erf = P.TopK(sorted=True), P.Softmax(axis=-1), SoftplusOp(), P.Erf()
        self.thirds = P.Split(axis=2, output_num=3)

    def _is_noisy(self, scores_GNS: Tensor) -> bool:
        return bool(scores_GNS.shape[2] != self.experts)

    def _sizes(self, scores_GNS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the noise's standard deviation, the noise added, (G, N, E) each."""
        clean_GNE, raw_GNE, noise_GNE = self.thirds(scores_GNS)
        sigma_GNE = self.softplus(raw_GNE) + self.epsilon
        return clean_GNE, sigma_GNE, noise_GNE * sigma_GNE

    def _logits(self, scores_GNS: Tensor) -> Tensor:
        """With the noise, where there is some."""
        if self._is_noisy(scores_GNS):
            clean_GNE, _, added_GNE = self._sizes(scores_GNS)
            return clean_GNE + added_GNE
        return scores_GNS

    def choose(self, scores_GNS: Tensor) -> Choice:
        """See ``Gate``."""
        kept_GNK, expert_GNK = self.topk(self._logits(scores_GNS), self.chosen)
        expert_GNK = ops.stop_gradient(expert_GNK)
        score_GNK = kept_GNK
        if self.softmax:  # of one it is always 1: see TopkChoice
            score_GNK = self.weigh(kept_GNK) if self.chosen > 1 else ops.ones_like(kept_GNK)
        place_GNKE = ops.cast(ops.expand_dims(expert_GNK, -1) == self.number_E, ms.float32)
        spread_GNE = (ops.expand_dims(score_GNK, -1) * place_GNKE).sum(2)
        weight_GNK = score_GNK * self.factor if self.multiply else ops.ones_like(score_GNK)
        return expert_GNK, weight_GNK, spread_GNE

    def loss(
        self, scores_GNS: Tensor, spread_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None
    ) -> Tensor:
        """See ``Gate``."""
        if self.balance == 0 or self.experts == 1:
            return ops.zeros_like(counts_GE[:, 0])
        load_GE = counts_GE
        if self._is_noisy(scores_GNS) and self.chosen < self.experts:
            load_GE = _sum_of(self._chances(scores_GNS), counted_GN)
        elif self.as_released:
            load_GE = _sum_of(ops.cast(spread_GNE > 0, ms.float32), counted_GN)
        importance_GE = _sum_of(spread_GNE, counted_GN)
        return self.balance * (self._squared_variation(importance_GE) + self._squared_variation(load_GE))

    def _chances(self, scores_GNS: Tensor) -> Tensor:
        """The chance (G, N, E) that an expert is chosen if its own noise is drawn again: that it exceeds the best of
        those left out, or, where it is left out, the last of the chosen."""
        clean_GNE, sigma_GNE, added_GNE = self._sizes(scores_GNS)
        logits_GNE = clean_GNE + added_GNE
        around_GNK, _ = self.topk(logits_GNE, self.chosen + 1)
        last_in, first_out = around_GNK[:, :, self.chosen - 1 : self.chosen], around_GNK[:, :, self.chosen :]
        compared_GNE = added_GNE if self.as_released else logits_GNE
        inside_GNE = ops.cast(ops.stop_gradient(compared_GNE > first_out), ms.float32)
        limit_GNE = inside_GNE * first_out + (1.0 - inside_GNE) * last_in
        distance_GNE = (clean_GNE - limit_GNE) / sigma_GNE
        return 0.5 * (1.0 + self.erf(distance_GNE * math.sqrt(0.5)))

    def _squared_variation(self, value_GE: Tensor) -> Tensor:
        """Variance over E - 1 by squared mean (G)."""
        mean_GE = value_GE.mean(-1, keep_dims=True)
        variance_G = ops.square(value_GE - mean_GE).sum(-1) / self.divisor
        return variance_G / (ops.square(mean_GE[:, 0]) + 1e-10)


def _sum_of(x_GNE: Tensor, counted_GN: Tensor | None) -> Tensor:
    """Over the tokens that count (G, E)."""
    return x_GNE.sum(1) if counted_GN is None else (x_GNE * ops.expand_dims(counted_GN, -1)).sum(1)


def _product(spec: NetworkSpec, moe: MoESpec, operators: Operators, width: int, std: float) -> RouterGate:
    gate = RouterGate(width, moe.num_local_experts, std, operators.router_dtype(moe.router_dtype))
    gate.product = Shards(spec).shard(gate.product, "gate")
    return gate


class NoisyGate(nn.Cell):
    """A linear product, of zeros at first, and another one for the noise's size; ``ms.moe.gate.Gate``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        self.dense = _product(spec, moe, operators, spec.model.hidden_size, self.start(spec))
        self.noise = _product(spec, moe, operators, spec.model.hidden_size, 0.0)
        self.router = operators.build(NoisyChoice, moe)
        self.no_bias = Tensor(np.zeros(moe.num_local_experts, np.float32))
        self.join = Shards(spec).shard_list(P.Concat(axis=-1), "tok -", 3)

    @staticmethod
    def start(spec: NetworkSpec) -> float:
        """Standard deviation of the first weights."""
        return 0.0

    def scores(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E)."""
        return self.dense(x_TD)

    def noisy_scores(self, x_TD: Tensor, noise_TE: Tensor) -> Tensor:
        """(T, 3E): logits, the size of the noise before softplus, the noise."""
        return self.join((self.scores(x_TD), self.noise(x_TD), noise_TE))

    def bias(self) -> Tensor:
        """See ``Gate``: none."""
        return self.no_bias

    def choose(self, scores_GNS: Tensor, bias_E: Tensor) -> Choice:
        """See ``Gate``."""
        return self.router.choose(scores_GNS)

    def loss(self, scores_GNS: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None) -> Tensor:
        """See ``Gate``."""
        return self.router.loss(scores_GNS, prob_GNE, counts_GE, counted_GN)


class NoisyMlpGate(NoisyGate):
    """Two layers with tanh between."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__(spec, moe, operators)
        self.out = _product(spec, moe, operators, moe.num_local_experts, self.start(spec))
        self.tanh = Shards(spec).local(operators.build(TanhOp), "gate rows")

    @staticmethod
    def start(spec: NetworkSpec) -> float:
        """Standard deviation of the first weights."""
        return spec.model.initializer_range

    def scores(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E)."""
        return self.out(self.tanh(self.dense(x_TD)))


GATES |= {"linear_noisy": NoisyGate, "mlp_noisy": NoisyMlpGate}
