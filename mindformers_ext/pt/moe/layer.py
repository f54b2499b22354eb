# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: router, tokens to rows, experts, rows back to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.moe.exchange import ExpertExchange
from mindformers_ext.pt.moe.experts import Experts
from mindformers_ext.pt.moe.router import TopkRouterV2
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.rows import combine, dispatch, sort_by_expert


class RouterGate(nn.Module):
    """Router logits: x Wg^T in the router's type (float32 unless asked). Weight (E, D), no bias."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        moe = spec.model.routing
        self.weight = nn.Parameter(torch.empty(moe.num_local_experts, spec.model.hidden_size))
        self.std, self.dtype = spec.model.initializer_range, torch_dtype(moe.router_dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh normal weights."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.to(self.dtype), self.weight.to(self.dtype)).float()


class Router(nn.Module):
    """Gate and routing; its parts carry MindFormers' names ``router.dense`` and ``router.router``."""

    def __init__(self, spec: NetworkSpec, groups: int) -> None:
        super().__init__()
        self.dense = RouterGate(spec)
        self.router = TopkRouterV2(spec.model.routing, spec.parallel)
        self.groups = groups

    def logits(self, x_TD: Tensor) -> Tensor:
        """(G, N, E) float32."""
        logits_TE = self.dense(x_TD)
        return logits_TE.view(self.groups, logits_TE.shape[0] // self.groups, -1)


class MoE(nn.Module):
    """Mixture of SwiGLU experts.

    Input (T, D), T tokens of ``groups`` routing groups one after the other. Outputs (T, D), aux_loss (G) and report
    (G, E + 1): assignments per expert before dropping, and the share dropped.
    """

    def __init__(self, spec: NetworkSpec, groups: int | None = None) -> None:
        super().__init__()
        self.experts = spec.model.routing.num_local_experts
        self.router = Router(spec, groups or spec.parallel.groups)
        self.ffn = Experts(spec)
        self.exchange: ExpertExchange | None = None  # where the experts are spread over ranks

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.router.router(self.router.logits(x_TD))
        kept = None if routing.kept_GNK is None else routing.kept_GNK.flatten(0, 1)
        out_TD = self.computed(x_TD, routing.expert_GNK.flatten(0, 1), routing.coeff_GNK.flatten(0, 1), kept)
        report_GE = torch.cat((routing.counts_GE, routing.dropped_G[:, None]), 1)
        return out_TD, routing.aux_loss_G, report_GE

    def computed(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        """The weighted sum (T, D) of the chosen experts."""
        place = sort_by_expert(expert_TK, kept_TK, self.experts)
        if self.exchange is None:
            return self.ffn.of_tokens(x_TD, weight_TK, place)
        return combine(self.exchange(dispatch(x_TD, place), place.offs_E, self.ffn), weight_TK, place)

    def dropless(self, x_TD: Tensor) -> Tensor:
        """The same without losses, reports and dropping: inference."""
        gate_GNK, expert_GNK = self.router.router.choose(self.router.dense(x_TD)[None])
        return self.computed(x_TD, expert_GNK[0], gate_GNK[0], None)
