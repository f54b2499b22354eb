# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.ops.dtypes import torch_dtype


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019), computed in ``norm_dtype``. Input and output (T, D)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(spec.model.hidden_size, dtype=torch_dtype(spec.numerics.param_dtype)))
        self.eps, self.dtype = spec.model.rms_norm_eps, torch_dtype(spec.numerics.norm_dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        y = F.rms_norm(x_TD.to(self.dtype), (x_TD.shape[-1],), self.weight.to(self.dtype), self.eps)
        return y.to(x_TD.dtype)
