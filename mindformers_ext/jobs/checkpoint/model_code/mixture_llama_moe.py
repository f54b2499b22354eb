# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of LLaMA-MoE: gate, experts, how their outputs are put together, and the residual variant.

Letters in comments: T tokens, H width, E experts, K chosen, F an expert's width. Parameters have the names of the
published checkpoints. All switches are read from the configuration when they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llama_moe import DROPPING, THRESHOLD, LlamaMoEConfig

linear = nn.functional.linear


class LlamaMoEZeroLinear(nn.Linear):
    """A linear layer without bias whose first weights are 0."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class LlamaMoERouting(NamedTuple):
    """Experts (T, K), best first, and their scores (T, K); of a gate by threshold which are passed (T, E) bool, and as
    numbers of 0 and 1; per expert (E,), and the loss: None where nobody asked."""

    index: torch.Tensor
    scores: torch.Tensor
    importance: torch.Tensor | None = None
    load: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


class LlamaMoEReport(NamedTuple):
    """What a layer tells beside its output; importance and load are (E,), None where nobody asked."""

    balance_loss: torch.Tensor | None
    importance: torch.Tensor | None
    load: torch.Tensor | None
    dropped: int


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: routing is computed there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cv_squared(value: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation, variance over n - 1; 0 for one expert."""
    if value.shape[0] == 1:
        return value.new_zeros(())
    return value.var() / (value.mean() ** 2 + 1e-10)


def gate_network(kind: str, hidden: int, experts: int) -> nn.Module:
    """Two layers with tanh between, or one that starts at 0."""
    if kind == "linear":
        return LlamaMoEZeroLinear(hidden, experts)
    return nn.Sequential(nn.Linear(hidden, experts, bias=False), nn.Tanh(), nn.Linear(experts, experts, bias=False))


class LlamaMoEGate(nn.Module):
    """Noisy top-k gate (Shazeer et al., arXiv 1701.06538) over E experts, its scores a softmax of the chosen logits."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_network = gate_network(config.gate_network, config.hidden_size, config.num_experts)
        self.weight_noise = LlamaMoEZeroLinear(config.hidden_size, config.num_experts)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Standard normal noise (T, E) from torch's generator."""
        return torch.randn_like(logits)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None, counted: bool = True) -> LlamaMoERouting:
        """x (T, H); ``real`` (T,) bool: False for padding, which is routed but not counted."""
        config, clean = self.config, wide(self.gate_network(x))
        logits, noise, sigma = clean, None, None
        if self.training and config.gate_add_noise:
            sigma = nn.functional.softplus(wide(self.weight_noise(x))) + config.gate_noise_epsilon
            noise = self.draw(clean) * sigma
            logits = clean + noise
        order = torch.sort(logits, dim=-1, descending=True, stable=True)  # of equal ones the lower number
        index, kept = order.indices[:, : config.num_selects], order.values[:, : config.num_selects]
        scores = kept.softmax(-1) if config.gate_use_softmax else kept
        if not counted:
            return LlamaMoERouting(index, scores)
        share = torch.zeros_like(logits).scatter(1, index, scores)
        if noise is not None and sigma is not None and config.num_selects < config.num_experts:
            load = self.chances(clean, sigma, logits, noise, order.values)
        elif config.load_compat == "reference":
            load = (share > 0).to(share.dtype)
        else:
            load = torch.zeros_like(share).scatter(1, index, 1.0)
        if real is not None:
            share, load = share * real[:, None], load * real[:, None]
        importance, load = share.sum(0), load.sum(0)
        loss = importance.new_zeros(())
        if config.gate_use_balance and len(x):
            loss = config.gate_balance_loss_weight * (cv_squared(importance) + cv_squared(load))
        return LlamaMoERouting(index, scores, importance, load, loss)

    def chances(
        self,
        clean: torch.Tensor,
        sigma: torch.Tensor,
        logits: torch.Tensor,
        noise: torch.Tensor,
        ordered: torch.Tensor,
    ) -> torch.Tensor:
        """(T, E): how likely an expert would be chosen if its own noise were drawn again, the others' kept.

        It has to exceed the K-th largest of the other logits. The released code asks noise alone whether an expert is
        in (``load_compat="reference"``).
        """
        last_in, first_out = (
            ordered[:, self.config.num_selects - 1 :][:, :1],
            ordered[:, self.config.num_selects :][:, :1],
        )
        inside = (noise if self.config.load_compat == "reference" else logits) > first_out
        return torch.special.ndtr((clean - torch.where(inside, first_out, last_in)) / sigma)

    def reset(self) -> None:
        """Fresh weights of the gate's network, the noise's kept."""
        for module in self.gate_network.modules():
            if isinstance(module, LlamaMoEZeroLinear):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)


class LlamaMoEThresholdGate(nn.Module):
    """Lets a token pass the experts whose score W x + b is 0 or more; nothing of it learns."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_network = nn.Linear(config.hidden_size, config.num_experts)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None, counted: bool = True) -> LlamaMoERouting:
        """As ``LlamaMoEGate``."""
        logits = wide(linear(x, self.gate_network.weight)) + self.gate_network.bias
        chosen = logits >= 0
        scores = chosen.to(logits.dtype)
        if not counted:
            return LlamaMoERouting(chosen, scores)
        load = (scores if real is None else scores * real[:, None]).sum(0)
        return LlamaMoERouting(chosen, scores, load, load, load.new_zeros(()))

    def reset(self) -> None:
        """Fresh weights."""
        init_weights(self.gate_network, self.config.initializer_range)


class LlamaMoEExperts(nn.Module):
    """Experts of any sizes: gate and up (F, H), down (H, F) each, no biases."""

    def __init__(self, config: LlamaMoEConfig, sizes: list[int]) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.act = ACT2FN[config.hidden_act]
        self.weight_gate = nn.ParameterList(nn.Parameter(torch.empty(size, hidden)) for size in sizes)
        self.weight_up = nn.ParameterList(nn.Parameter(torch.empty(size, hidden)) for size in sizes)
        self.weight_down = nn.ParameterList(nn.Parameter(torch.empty(hidden, size)) for size in sizes)

    def expert(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """One expert's output (T, H)."""
        inner = self.act(linear(x, self.weight_gate[number])) * linear(x, self.weight_up[number])
        return linear(inner, self.weight_down[number])

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows sorted by expert, ``counts`` of them for each; (T, H)."""
        parts = [self.expert(part, e) for e, part in enumerate(x.split(counts)) if counts[e]]
        return torch.cat(parts) if parts else x

    def reset(self) -> None:
        """Fresh weights."""
        for weights in (self.weight_gate, self.weight_up, self.weight_down):
            reset_experts(weights)


def reset_experts(weights: nn.ParameterList) -> None:
    """Uniform within 1 / sqrt(inputs)."""
    for weight in weights:
        bound = weight.shape[1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)


class LlamaMoEScale(nn.Module):
    """One learned scalar."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.full((1,), first))


class LlamaMoECalculator(nn.Module):
    """Sends tokens to their experts and sums what comes back."""

    def __init__(self, config: LlamaMoEConfig, layer: int, residual: bool = False) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.experts = LlamaMoEExperts(config, config.residual_sizes(layer) if residual else config.sizes(layer))
        self.mlp_norm = None
        if config.add_weight_norm and config.multiply_gate_scores and not residual:
            self.mlp_norm = LlamaMoEScale(config.factor("score_scale_factor", layer))

    def weighted(self, out: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Rows (N, H) by their scores (N,) and the factor; as they are without ``multiply_gate_scores``."""
        if not self.config.multiply_gate_scores:
            return out
        if self.mlp_norm is not None:
            return out * scores.to(out.dtype)[:, None] * self.mlp_norm.weight
        factor = self.config.factor("score_scale_factor", self.layer)
        return out * (scores * factor).to(out.dtype)[:, None]

    def forward(self, x: torch.Tensor, routing: LlamaMoERouting) -> tuple[torch.Tensor, int]:
        """(T, H), and how many assignments found their expert full."""
        if self.config.gate_network == THRESHOLD:
            return self.passed(x, routing.index), 0
        if len(x) == 1 and not self.training:  # a text is continued by one token: nothing to sort
            rows = torch.cat([self.experts.expert(x, e) for e in routing.index[0].tolist()])
            return self.weighted(rows, routing.scores[0]).sum(0, keepdim=True), 0
        chosen = routing.index.shape[1]
        flat, lost = routing.index.reshape(-1), None
        if self.training and self.config.calculator_type == DROPPING and self.config.drop_tokens:
            order, lost = self.fitting(routing.index)
        else:
            order = flat.argsort(stable=True)
        counts = flat[order].bincount(minlength=self.config.num_experts).tolist()
        token = torch.div(order, chosen, rounding_mode="floor")
        out = self.experts(x.index_select(0, token), counts)
        out = self.weighted(out, routing.scores.reshape(-1).index_select(0, order))
        y = torch.zeros_like(x).index_add(0, token, out)
        if lost is None:
            return y, 0
        if self.config.dropped_padding == "input":
            token = torch.div(lost, chosen, rounding_mode="floor")
            y = y.index_add(0, token, x.index_select(0, token))
        return y, len(lost)

    def passed(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The plain sum (T, H) of the experts that each token passes, ``chosen`` (T, E) bool."""
        token = chosen.T.nonzero()[:, 1]  # expert after expert
        out = self.experts(x.index_select(0, token), chosen.sum(0).tolist())
        return torch.zeros_like(x).index_add(0, token, out)

    def fitting(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Assignments that find room, sorted by expert, and those that do not; tokens come in a random order."""
        tokens, chosen = index.shape
        experts = self.config.num_experts
        limit = int(self.config.capacity_factor * chosen * tokens / experts)
        turn = torch.randperm(tokens, device=index.device)
        flat = index[turn].reshape(-1)
        order = flat.argsort(stable=True)
        sizes = flat.bincount(minlength=experts)
        place = torch.arange(len(flat), device=index.device) - (sizes.cumsum(0) - sizes)[flat[order]]
        number = turn[torch.div(order, chosen, rounding_mode="floor")] * chosen + order % chosen
        return number[place < limit], number[place >= limit]


class LlamaMoEMixture(nn.Module):
    """Gate and experts."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.gate = (LlamaMoEThresholdGate if config.gate_network == THRESHOLD else LlamaMoEGate)(config)
        self.calculator = LlamaMoECalculator(config, layer)

    def forward(
        self, x: torch.Tensor, real: torch.Tensor | None = None, counted: bool = True
    ) -> tuple[torch.Tensor, LlamaMoEReport]:
        """x (B, S, H), ``real`` (B, S) bool: False for padding; the output (B, S, H) and what there is to report."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.gate(flat, None if real is None else real.reshape(-1), counted)
        out, dropped = self.calculator(flat, routing)
        return out.view_as(x), LlamaMoEReport(routing.balance_loss, routing.importance, routing.load, dropped)


class LlamaMoEResidualGate(nn.Module):
    """Scores of all residual experts."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.gate_network = gate_network("linear", config.hidden_size, config.num_experts_residual)


class LlamaMoEResidualBlock(nn.Module):
    """Experts that every token passes, weighed by a linear gate."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = LlamaMoEResidualGate(config)
        self.calculator = LlamaMoECalculator(config, layer, residual=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H)."""
        scores = wide(self.gate.gate_network(x))
        scores = scores.softmax(-1) if self.config.gate_use_softmax_residual else scores
        scores = (scores * self.config.factor("score_scale_factor_residual", self.layer)).to(x.dtype)
        out = torch.zeros_like(x)
        for number in range(self.config.num_experts_residual):
            part = self.calculator.experts.expert(x, number)
            out = out + (part * scores[..., number, None] if self.config.multiply_gate_scores_residual else part)
        return out


class LlamaMoEResidualMixture(nn.Module):
    """A mixture beside a residual block: their sum, or their mean weighed by a softmax of two logits."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.moe_layer = LlamaMoEMixture(config, layer)
        self.residual_block = LlamaMoEResidualBlock(config, layer)
        self.weighting_network = None
        if config.use_weighting:
            self.weighting_network = nn.Sequential(nn.Linear(config.hidden_size, 2, bias=False), nn.Softmax(-1))

    def forward(
        self, x: torch.Tensor, real: torch.Tensor | None = None, counted: bool = True
    ) -> tuple[torch.Tensor, LlamaMoEReport]:
        """As ``LlamaMoEMixture``."""
        routed, report = self.moe_layer(x, real, counted)
        residual = self.residual_block(x)
        if self.weighting_network is None:
            return routed + residual, report
        share = self.weighting_network(x)
        return routed * share[..., :1] + residual * share[..., 1:], report


def init_weights(module: nn.Module, std: float) -> None:
    """First weights of one module, its children not included."""
    if isinstance(module, LlamaMoEZeroLinear):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.ParameterList):
        reset_experts(module)
    elif isinstance(module, LlamaMoEScale):
        nn.init.constant_(module.weight, module.first)
