# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts: two grouped products of rows sorted by expert, or kernels that fetch their tokens themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.capacity import round_up
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.linear import fill_normal
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.gathered import gathered_experts
from mindformers_ext.pt.ops.grouped import Backend, grouped_product, spans
from mindformers_ext.pt.ops.products import prepacked, product, uses_onednn
from mindformers_ext.pt.ops.rows import Sorted, combine, dispatch
from mindformers_ext.pt.ops.select import select_backend
from mindformers_ext.pt.ops.swiglu import swiglu

ROWS = 16  # more of them come in multiples of it


class Experts(nn.Module):
    """w2(silu(w1 x) * w3 x) of every row's expert (Mixtral of Experts, section 2.1).

    Weights lie as in Hugging Face's fused spelling: ``gate_up`` (E, 2F, D) holds w1 above w3, ``down`` (E, D, F); where
    experts have biases, ``bias`` (E, D) is added behind w2.
    Input and output (R, D), rows sorted by expert, ``offs_E`` (E) int32 their inclusive ends; rows behind
    are undefined.
    """

    def __init__(self, spec: NetworkSpec, moe: MoESpec) -> None:
        super().__init__()
        model, dtype = spec.model, torch_dtype(spec.numerics.param_dtype)
        experts, hidden = moe.num_local_experts, model.hidden_size
        ffn = moe.intermediate_size or model.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * ffn, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, hidden, dtype=dtype)) if moe.expert_bias else None
        self.std, self.hidden, self.ffn = model.initializer_range, hidden, ffn
        self.backend: Backend | None = None  # None: by the table
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh normal weights."""
        fill_normal(self.gate_up, self.std)
        fill_normal(self.down, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def selected(self, tokens: int | None, dtype: torch.dtype, device: torch.device) -> Backend:
        """The back end for so many tokens, all of them here; None for rows that came sorted from other ranks."""
        return self.backend or select_backend(device, dtype, self.hidden, self.ffn, tokens)

    def forward(self, x: Tensor, offs_E: Tensor, backend: Backend | None = None) -> Tensor:
        backend = backend or self.selected(None, x.dtype, x.device)
        both = grouped_product(x, self.gate_up.to(x.dtype), offs_E, backend)
        y = grouped_product(swiglu(both), self.down.to(x.dtype), offs_E, backend)
        if self.bias is None:
            return y
        expert = torch.searchsorted(offs_E, torch.arange(len(y), dtype=offs_E.dtype, device=y.device), right=True)
        return y + self.bias.to(y.dtype)[expert.clamp(max=len(offs_E) - 1)]

    def of_tokens(self, x_TD: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
        """The weighted sum (T, D) of each token's experts, all of which are here."""
        if self.backend is None and uses_onednn(x_TD):
            return self._by_expert(x_TD, weight_TK, place)
        backend = self.selected(x_TD.shape[0], x_TD.dtype, x_TD.device)
        if not backend.gathers or self.bias is not None:
            return combine(self(dispatch(x_TD, place), place.offs_E, backend), weight_TK, place)
        kind = x_TD.dtype
        return gathered_experts(x_TD, self.gate_up.to(kind), self.down.to(kind), weight_TK, place)

    def of_token(self, x_1D: Tensor, weight_1K: Tensor, expert_1K: Tensor) -> Tensor:
        """The same (1, D) of one token, whose experts alone are read; their numbers are read on the host, E is none."""
        total, kind = torch.zeros_like(x_1D), x_1D.dtype
        for expert, weight in zip(expert_1K[0].tolist(), weight_1K.to(kind).unbind(1), strict=True):
            if expert == len(self.down):
                continue
            total = torch.addcmul(total, self._of_expert(expert, x_1D), weight)
        return total

    def _of_expert(self, expert: int, x: Tensor) -> Tensor:
        """One expert's answer (R, D) to rows (R, D) that are all its own."""
        gate, up = product(x, self.gate_up[expert]).chunk(2, -1)
        y = product(F.silu(gate).mul_(up), self.down[expert])
        return y if self.bias is None else y + self.bias[expert].to(x.dtype)

    def _by_expert(self, x_TD: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
        """``of_tokens`` without gradients: one expert at a time, whose rows alone are held.

        oneDNN makes and keeps code for every number of rows (1 ms, 1 MB): rows of the first token fill up to a few.
        """
        total_TD, weight = torch.zeros_like(x_TD), weight_TK.reshape(-1, 1).to(x_TD.dtype)
        for expert, low, high in spans(place.offs_E):
            token, count = place.token[low:high], high - low
            filled = F.pad(token, (0, round_up(count, ROWS) - count)) if count > ROWS else token
            y = self._of_expert(expert, x_TD.index_select(0, filled))[:count]
            total_TD.index_add_(0, token, y.mul_(weight.index_select(0, place.order[low:high])))
        return total_TD

    def prepack(self, rows: int) -> None:
        """Lay each matrix as ``ops.products`` reads it for so many rows; only inference, in their type, from now on."""
        for name in ("gate_up", "down"):
            matrices = getattr(self, name)
            if isinstance(matrices, nn.ParameterList):
                continue
            delattr(self, name)
            if rows == 1:
                setattr(self, name, nn.Parameter(prepacked(matrices, 1), requires_grad=False))
                continue
            each = (nn.Parameter(prepacked(weight, rows), requires_grad=False) for weight in matrices)
            setattr(self, name, nn.ParameterList(each))
