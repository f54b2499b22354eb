# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: gate, tokens to rows, experts, rows back to tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.feed_forward import FeedForwardOutput
from mindformers_ext.pt.moe.exchange import ExpertExchange
from mindformers_ext.pt.moe.experts import Experts
from mindformers_ext.pt.moe.gate import build_gate
from mindformers_ext.pt.moe.slots import Routing, apply_slots, build_slots
from mindformers_ext.pt.ops.rows import combine, dispatch, sort_by_expert


class MoE(nn.Module):
    """Mixture of SwiGLU experts, ``pt.feed_forward.FeedForward``; the gate's parameters stand below ``router``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec) -> None:
        super().__init__()
        self.experts, self.groups = moe.num_local_experts, spec.parallel.groups
        self.has_empty = moe.by_threshold
        self.router = build_gate(spec, moe)
        self.slots = build_slots(moe, spec.parallel)
        self.ffn = Experts(spec, moe)
        self.exchange: ExpertExchange | None = None  # where the experts are spread over ranks

    def route(self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None) -> Routing:
        """What becomes of every token of the routing groups."""
        T, D = x_TD.shape
        x_GND = x_TD.view(self.groups, T // self.groups, D)
        counted_GN = None if counted_T is None else counted_T.view(x_GND.shape[:2])
        return apply_slots(self.router(x_GND, noise_TE, counted_GN), self.slots, self.training)

    def forward(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        routing = self.route(x_TD, noise_TE, counted_T)
        expert_TK = routing.expert_GNK.flatten(0, 1)
        kept_TK = self.filled(expert_TK) if routing.kept_GNK is None else routing.kept_GNK.flatten(0, 1)
        y_TD = self.computed(x_TD, expert_TK, routing.weight_GNK.flatten(0, 1), kept_TK)
        report_GE = torch.cat((routing.counts_GE, routing.dropped_G[:, None]), 1)
        return FeedForwardOutput(y_TD, routing.aux_loss_G, report_GE)

    def filled(self, expert_TK: Tensor) -> Tensor | None:
        """Which places of the tokens hold an expert (T, K); None where all do."""
        return expert_TK < self.experts if self.has_empty else None

    def computed(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        """The weighted sum (T, D) of the chosen experts."""
        place = sort_by_expert(expert_TK, kept_TK, self.experts)
        if self.exchange is None:
            return self.ffn.of_tokens(x_TD, weight_TK, place)
        return combine(self.exchange(dispatch(x_TD, place), place.offs_E, self.ffn), weight_TK, place)

    def dropless(self, x_TD: Tensor) -> Tensor:
        """See ``FeedForward``."""
        weight_GNK, expert_GNK = self.router.choose(x_TD[None])
        if len(x_TD) == 1 and self.exchange is None and self.ffn.selected(1, x_TD.dtype, x_TD.device).one_by_one:
            return self.ffn.of_token(x_TD, weight_GNK[0], expert_GNK[0])
        return self.computed(x_TD, expert_GNK[0], weight_GNK[0], self.filled(expert_GNK[0]))

    def mixtures(self) -> Iterator[MoE]:
        """This one."""
        yield self

    def capturable(self, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
        """As the experts' back end is; gates read nothing on the host."""
        return self.ffn.selected(tokens, dtype, device).capturable
