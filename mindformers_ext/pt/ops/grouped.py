# SPDX-License-Identifier: Apache-2.0
"""Matrix products of rows sorted by expert with one matrix per expert, by exchangeable back ends.

Rows at or past the last offset belong to no expert: the products neither read nor write them, in the gradient too. What
stands there is undefined (torch's kernels leave old memory, NaN included), so whoever reads results masks those rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes, of grouped_mm's strides


@dataclass(frozen=True)
class Backend:
    """Three products over sorted rows, for ``offs`` (E) int32 inclusive end offsets.

    forward(x (R, in), w (E, out, in)) -> (R, out); to_input(dy (R, out), w) -> (R, in); to_weight(dy, x) -> (E, out,
    in), exactly zero for an expert without rows. ``capturable``: never reads on the host, fit for a CUDA graph.
    ``gathers``: tokens at hand go through ``gathered`` instead, unsorted, and the products serve its gradients.
    ``one_by_one``: in inference a single token goes through its experts one after the other, unsorted.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_input: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_weight: Callable[[Tensor, Tensor, Tensor], Tensor]
    capturable: bool = True
    gathers: bool = False
    one_by_one: bool = False


def spans(offs_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) of experts that have rows; reads the offsets on the host, once."""
    ends = offs_E.tolist()
    starts = [0, *ends[:-1]]
    return [(e, low, high) for e, (low, high) in enumerate(zip(starts, ends, strict=True)) if high > low]


def _loop_forward(x: Tensor, w: Tensor, offs_E: Tensor) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[1]))
    for e, low, high in spans(offs_E):
        torch.mm(x[low:high], w[e].t(), out=out[low:high])
    return out


def _loop_to_input(dy: Tensor, w: Tensor, offs_E: Tensor) -> Tensor:
    out = dy.new_empty((dy.shape[0], w.shape[2]))
    for e, low, high in spans(offs_E):
        torch.mm(dy[low:high], w[e], out=out[low:high])
    return out


def _loop_to_weight(dy: Tensor, x: Tensor, offs_E: Tensor) -> Tensor:
    out = x.new_empty((offs_E.shape[0], dy.shape[1], x.shape[1]))
    filled = {e: (low, high) for e, low, high in spans(offs_E)}
    for e in range(offs_E.shape[0]):
        if e in filled:
            low, high = filled[e]
            torch.mm(dy[low:high].t(), x[low:high], out=out[e])
        else:
            out[e].zero_()
    return out


def _gmm_forward(x: Tensor, w: Tensor, offs_E: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(1, 2), offs=offs_E)


def _gmm_to_input(dy: Tensor, w: Tensor, offs_E: Tensor) -> Tensor:
    return F.grouped_mm(dy, w, offs=offs_E)


def _gmm_to_weight(dy: Tensor, x: Tensor, offs_E: Tensor) -> Tensor:
    out = F.grouped_mm(dy.t(), x, offs=offs_E)
    if x.is_cuda:  # some kernels leave old memory where an expert has no rows (pytorch issue 172439)
        counts_E = torch.diff(offs_E, prepend=offs_E.new_zeros(1))
        out = torch.where((counts_E > 0)[:, None, None], out, out.new_zeros(()))
    return out


LOOP = Backend("loop", _loop_forward, _loop_to_input, _loop_to_weight, capturable=False, one_by_one=True)
GMM = Backend("gmm", _gmm_forward, _gmm_to_input, _gmm_to_weight)
TRITON = replace(GMM, name="triton", gathers=True)
BACKENDS = {"loop": LOOP, "gmm": GMM, "triton": TRITON}


class _GroupedProduct(torch.autograd.Function):
    """See ``grouped_product``. Gradients come in any layout (expanded, strided) and are made plain here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offs_E: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(x, w, offs_E)
        ctx.backend = backend
        return backend.forward(x, w, offs_E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, offs_E = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = ctx.backend.to_input(dy, w, offs_E) if ctx.needs_input_grad[0] else None
        dw = ctx.backend.to_weight(dy, x, offs_E) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


def grouped_product(x: Tensor, w: Tensor, offs_E: Tensor, backend: Backend) -> Tensor:
    """Rows x (R, in) times the transposed matrix of their expert, w (E, out, in): (R, out), see ``Backend``."""
    return _GroupedProduct.apply(x, w, offs_E, backend)


def fits_gmm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped_mm takes matrices of these widths: a known type, strides of whole 16 bytes."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * dtype.itemsize % ALIGNMENT == 0 for width in widths)
