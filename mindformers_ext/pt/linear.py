# SPDX-License-Identifier: Apache-2.0
"""Linear layers: those that LoRA may adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindformers_ext.pt.ops.products import prepacked, product


def fill_normal(weight: nn.Parameter, std: float) -> None:
    """Draw ``weight``. One on the meta device has nothing to draw, and torch would import its compiler for it (1 s)."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Linear(nn.Module):
    """x W^T, plus b where ``bias``. Input (T, in), output (T, out), weight (out, in), bias (out)."""

    def __init__(self, width_in: int, width_out: int, std: float, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width_out, dtype=dtype)) if bias else None
        self.std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh normal weights, no bias."""
        fill_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return product(x_TD, self.weight, self.bias)

    def prepack(self, rows: int) -> None:
        """Lay the weight as ``ops.products`` reads it for so many rows; the layer computes in its type from now on."""
        self.weight = nn.Parameter(prepacked(self.weight, rows), requires_grad=False)
