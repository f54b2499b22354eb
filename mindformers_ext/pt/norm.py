# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with its weight."""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.ops.dtypes import torch_dtype
from mindformers_ext.pt.ops.products import is_for_numpy


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
        if x.dim() == 2 and is_for_numpy(x) and self.weight.dtype == self.dtype == torch.float32:
            return self._of_row(x)
        y = F.rms_norm(x.to(self.dtype), (x.shape[-1],), self.weight.to(self.dtype), self.eps)
        return y.to(x.dtype)

    def _of_row(self, x_1D: Tensor) -> Tensor:
        """One row by numpy: torch makes seven operations of it, which take ten times as long."""
        row, weight = x_1D[0].numpy(), self.weight.numpy()
        scale = 1 / sqrt(float(np.dot(row, row)) / len(row) + self.eps)
        return torch.from_numpy(row * weight * np.float32(scale))[None]
