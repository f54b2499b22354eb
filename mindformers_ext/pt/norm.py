# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.ops.dtypes import torch_dtype


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019), computed in ``norm_dtype``.

    Input and output (..., width), by default the model's width; the mean is over the last dimension.
    """

    def __init__(self, spec: NetworkSpec, width: int | None = None) -> None:
        super().__init__()
        size, dtype = width or spec.model.hidden_size, torch_dtype(spec.numerics.param_dtype)
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.dtype = spec.model.rms_norm_eps, torch_dtype(spec.numerics.norm_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.to(self.dtype), (x.shape[-1],), self.weight.to(self.dtype), self.eps)
        return y.to(x.dtype)
