# SPDX-License-Identifier: Apache-2.0
"""The dense SwiGLU feed-forward layer of LLaMA."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt.attention import Linear
from mindformers_ext.pt.ops.dtypes import torch_dtype


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x). Input and output (T, D)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        model, dtype = spec.model, torch_dtype(spec.numerics.param_dtype)
        hidden, ffn, std = model.hidden_size, model.intermediate_size, model.initializer_range
        self.w1 = Linear(hidden, ffn, std, dtype)
        self.w2 = Linear(ffn, hidden, std, dtype)
        self.w3 = Linear(hidden, ffn, std, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD))
