# SPDX-License-Identifier: Apache-2.0
"""silu(gate) * up of rows that hold gate and up side by side (Shazeer 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.pt.ops.fused import fused


class _SwiGlu(torch.autograd.Function):
    """Keeps its input alone; everything else is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        if fused(both):
            from mindformers_ext.pt.ops.triton_kernels import swiglu_forward

            return swiglu_forward(both.contiguous())
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        dout = gradients[0]
        if fused(both):
            from mindformers_ext.pt.ops.triton_kernels import swiglu_backward

            return swiglu_backward(both.contiguous(), dout.contiguous())
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        dgate, dup = result.chunk(2, -1)
        torch.mul(dout, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dout * up, gate))
        return result


def swiglu(both: Tensor) -> Tensor:
    """(R, 2F), gate before up -> (R, F)."""
    return _SwiGlu.apply(both)
