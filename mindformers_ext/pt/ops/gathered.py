# SPDX-License-Identifier: Apache-2.0
"""Whole experts on tokens that are not sorted: the back end ``triton``, for decoding and for narrow experts.

Forward on a GPU: the kernels of ``triton_experts``; elsewhere their twins below, in plain torch. Backward on any
device: the layer once more through grouped products (``gmm``, or ``loop`` where the widths do not fit it), and their
gradients. Why no kernels of its own: the weights' gradient is a product with a long ragged inner width, which
grouped_mm does well, and the back end is meant for passes that have no backward. It costs one more forward pass, and
saves nothing but x and the indices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.pt.ops.fused import fused
from mindformers_ext.pt.ops.grouped import GMM, LOOP, fits_gmm, grouped_product, spans
from mindformers_ext.pt.ops.rows import Sorted, combine, dispatch
from mindformers_ext.pt.ops.swiglu import swiglu


def plain_gather_swiglu(x: Tensor, gate_up: Tensor, token: Tensor, offs_E: Tensor) -> Tensor:
    """Twin of ``triton_experts.gather_swiglu``: float32 up to the one rounding of the result (R, F)."""
    out = x.new_empty((token.shape[0], gate_up.shape[1] // 2))
    for e, low, high in spans(offs_E):
        gate, up = (x[token[low:high]].float() @ gate_up[e].float().t()).chunk(2, -1)
        out[low:high] = (F.silu(gate) * up).to(x.dtype)
    return out


def plain_down_sum(h: Tensor, down: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
    """Twin of ``triton_experts.down_scatter`` and ``sum_slots``: (T, D) in float32 up to the last rounding."""
    T, K = weight_TK.shape
    weight = weight_TK.reshape(-1).float()
    slots = torch.zeros((T * K, down.shape[1]), device=h.device)
    for e, low, high in spans(place.offs_E):
        order = place.order[low:high]
        slots[order] = (h[low:high].float() @ down[e].float().t()) * weight[order, None]
    total = torch.zeros((T, down.shape[1]), device=h.device)
    for k in range(K):
        total += slots[k::K]
    return total.to(h.dtype)


def _forward(x: Tensor, gate_up: Tensor, down: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
    if not fused(x):
        return plain_down_sum(plain_gather_swiglu(x, gate_up, place.token, place.offs_E), down, weight_TK, place)
    from mindformers_ext.pt.ops.triton_experts import down_scatter, gather_swiglu, sum_slots

    h = gather_swiglu(x.contiguous(), gate_up.contiguous(), place.token, place.offs_E)
    slots = down_scatter(h, down.contiguous(), weight_TK.contiguous(), place.order, place.offs_E)
    return sum_slots(slots, place.kept_TK, x.dtype)


class _GatheredExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weight_TK: Tensor, *place: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate_up, down, weight_TK, *place)
        return _forward(x, gate_up, down, weight_TK, Sorted(*place))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, needed = saved[:4], ctx.needs_input_grad[:4]
        with torch.enable_grad():
            again = [t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
            x, gate_up, down, weight_TK = again
            out = grouped_experts(x, gate_up, down, weight_TK, Sorted(*saved[4:]))
            found = iter(torch.autograd.grad(out, [t for t in again if t.requires_grad], gradients[0]))
        return (*(next(found) if n else None for n in needed), *(None,) * 5)


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
    """The same as ``gathered_experts`` by grouped products over copied rows: where its gradients come from."""
    backend = GMM if fits_gmm(x.dtype, gate_up.shape[2], gate_up.shape[1], down.shape[2]) else LOOP
    both = grouped_product(dispatch(x, place), gate_up, place.offs_E, backend)
    return combine(grouped_product(swiglu(both), down, place.offs_E, backend), weight_TK, place)


def gathered_experts(x: Tensor, gate_up: Tensor, down: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
    """The weighted sum (T, D) of the experts of tokens x (T, D): gate_up (E, 2F, D), down (E, D, F), all one type.

    Assignments behind the last offset add exactly 0.
    """
    return _GatheredExperts.apply(x, gate_up, down, weight_TK, *place)
