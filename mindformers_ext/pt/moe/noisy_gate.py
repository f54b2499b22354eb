# SPDX-License-Identifier: Apache-2.0
"""The gate of LLaMA-MoE: logits of one or two layers, noise while training, the best K alone weighed, and a loss of
balance of its own (Shazeer et al. 2017, arXiv:1701.06538, appendix A; Zhu et al. 2024, arXiv:2406.16554).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.moe.gate import GATES, Choice, RouterGate, best, count_assignments, counted_assignments
from mindformers_ext.pt.ops.dtypes import torch_dtype


class NoisyChoice(nn.Module):
    """Chooses by logit, weighs the chosen, and measures the balance. Holds no weights."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.experts, self.chosen = moe.num_local_experts, moe.num_experts_per_tok
        self.softmax, self.multiply = moe.gate_use_softmax, moe.multiply_gate_scores
        self.factor, self.epsilon, self.balance = moe.scale_of(0), moe.gate_noise_epsilon, moe.balance_weight
        self.as_released = moe.load_compat == "reference"

    def scores(self, logits_GNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (G, N, K) of the chosen, the chosen, and all experts in their order, best first."""
        order_GNE = best(logits_GNE.detach(), self.experts)
        expert_GNK = order_GNE[..., : self.chosen]
        kept_GNK = logits_GNE.gather(-1, expert_GNK)
        return torch.softmax(kept_GNK, -1) if self.softmax else kept_GNK, expert_GNK, order_GNE

    def weights(self, score_GNK: Tensor) -> Tensor:
        """What the experts' outputs are multiplied by."""
        return score_GNK * self.factor if self.multiply else torch.ones_like(score_GNK)

    def forward(
        self, clean_GNE: Tensor, drawn: tuple[Tensor, Tensor] | None = None, counted_GN: Tensor | None = None
    ) -> Choice:
        """``clean``: logits. ``drawn``: of a step with noise its size before softplus, and the noise."""
        noise: tuple[Tensor, Tensor] | None = None  # its size, and what is added
        if drawn is not None:
            sigma_GNE = F.softplus(drawn[0]) + self.epsilon
            noise = sigma_GNE, drawn[1] * sigma_GNE
        logits_GNE = clean_GNE if noise is None else clean_GNE + noise[1]
        score_GNK, expert_GNK, order_GNE = self.scores(logits_GNE)
        counts_GE, reported_GE = counted_assignments(expert_GNK, self.experts, counted_GN)
        loss_G = clean_GNE.new_zeros(clean_GNE.shape[0])
        if self.balance:
            importance_GE = _sum_of(torch.zeros_like(logits_GNE).scatter(-1, expert_GNK, score_GNK), counted_GN)
            load_GE = (counts_GE if reported_GE is None else reported_GE).float()
            if noise is not None and self.chosen < self.experts:
                compared_GNE = noise[1] if self.as_released else logits_GNE
                chance_GNE = self._chances(clean_GNE, noise[0], logits_GNE, compared_GNE, order_GNE)
                load_GE = _sum_of(chance_GNE, counted_GN)
            elif self.as_released:
                positive_GNK = score_GNK > 0
                seen_GNK = positive_GNK if counted_GN is None else positive_GNK & counted_GN[..., None]
                load_GE = count_assignments(expert_GNK, self.experts, seen_GNK).float()
            loss_G = self.balance * (squared_variation(importance_GE) + squared_variation(load_GE))
        return Choice(expert_GNK, self.weights(score_GNK), loss_G, counts_GE, reported_GE)

    def _chances(
        self, clean_GNE: Tensor, sigma_GNE: Tensor, logits_GNE: Tensor, compared_GNE: Tensor, order_GNE: Tensor
    ) -> Tensor:
        """The chance (G, N, E) that an expert is chosen if its own noise is drawn again: that it exceeds the best of
        those left out, or, where it is left out, the last of the chosen."""
        around_GN2 = logits_GNE.gather(-1, order_GNE[..., self.chosen - 1 : self.chosen + 1])
        last_in, first_out = around_GN2[..., :1], around_GN2[..., 1:]
        limit_GNE = torch.where(compared_GNE > first_out, first_out, last_in)
        distance_GNE = (clean_GNE - limit_GNE) / sigma_GNE
        return 0.5 * (1.0 + torch.erf(distance_GNE * math.sqrt(0.5)))


def _sum_of(x_GNE: Tensor, counted_GN: Tensor | None) -> Tensor:
    """Over the tokens that count (G, E)."""
    return (x_GNE if counted_GN is None else x_GNE * counted_GN[..., None].to(x_GNE.dtype)).sum(1)


def squared_variation(value_GE: Tensor) -> Tensor:
    """Variance over E - 1 by squared mean (G); 0 of one expert."""
    if value_GE.shape[1] == 1:
        return value_GE.new_zeros(value_GE.shape[0])
    return value_GE.var(1) / (value_GE.mean(1).square() + 1e-10)


class NoisyGate(nn.Module):
    """A linear product, of zeros at first, and another one for the noise's size; ``pt.moe.gate.Gate``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, std: float = 0.0) -> None:
        super().__init__()
        dtype, hidden, experts = torch_dtype(moe.router_dtype), spec.model.hidden_size, moe.num_local_experts
        self.dense = RouterGate(hidden, experts, std, dtype)
        self.noise = RouterGate(hidden, experts, 0.0, dtype)
        self.router = NoisyChoice(moe)
        self.draws = moe.draws_noise

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) float32."""
        return self.dense(x_TD)

    def forward(self, x_GND: Tensor, noise_TE: Tensor | None = None, counted_GN: Tensor | None = None) -> Choice:
        """``noise_TE``: standard normal, of a training step; evaluation has none."""
        if self.draws and self.training and noise_TE is None:
            raise ValueError("a gate that adds noise is trained with noise: give it, or call eval()")
        shape, x_TD = (*x_GND.shape[:2], -1), x_GND.flatten(0, 1)
        clean_GNE = self.logits(x_TD).view(shape)
        if not self.training:
            return self.router(clean_GNE, None, counted_GN)
        drawn = None if noise_TE is None else (self.noise(x_TD).view(shape), noise_TE.view(shape))
        choice = self.router(clean_GNE, drawn, counted_GN)
        # a plain sum, one expert or no noise leave weights without effect: their gradient is zero, not missing
        unused = sum((weight.sum() * 0.0 for weight in self.parameters()), choice.aux_loss_G)
        return choice._replace(aux_loss_G=unused)

    def choose(self, x_GND: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Gate``."""
        clean_GNE = self.logits(x_GND.flatten(0, 1)).view(*x_GND.shape[:2], -1)
        score_GNK, expert_GNK, _ = self.router.scores(clean_GNE)
        return self.router.weights(score_GNK), expert_GNK


class NoisyMlpGate(NoisyGate):
    """Two layers with tanh between."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec) -> None:
        experts, std = moe.num_local_experts, spec.model.initializer_range
        super().__init__(spec, moe, std)
        self.out = RouterGate(experts, experts, std, torch_dtype(moe.router_dtype))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) float32."""
        return self.out(torch.tanh(self.dense(x_TD)))


GATES |= {"linear_noisy": NoisyGate, "mlp_noisy": NoisyMlpGate}
