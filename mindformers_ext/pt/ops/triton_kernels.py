# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for what lies between the experts' products: SwiGLU and the weighted sum over a token's experts.

Each reads and writes every element once; torch's own operators take three to five passes. Fixed order, no atomics, so
two runs are equal to the last bit. Their twins in plain torch stand in ``swiglu`` and ``rows``. Imported on a GPU only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns that one program takes


@triton.jit
def _swiglu_forward(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(both, dout, dboth, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    tl.store(dboth + row * 2 * width + column, d * up * (sigmoid + active - active * sigmoid), mask=inside)
    tl.store(dboth + row * 2 * width + width + column, d * active, mask=inside)


@triton.jit
def _combine(
    rows,
    row_of,
    weight,
    kept,
    out,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        is_kept = tl.load(kept + token * K + k) != 0
        row = tl.load(row_of + token * K + k)
        # a row behind the last offset may hold NaN: it is not read at all
        part = tl.load(rows + row * width + column, mask=inside & is_kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weight + token * K + k)
        total += part
    tl.store(out + token * width + column, total, mask=inside)


@triton.jit
def _combine_backward(
    rows,
    dout,
    order,
    token_of,
    weight,
    kept,
    drows,
    dweight,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    assignment, token = tl.load(order + row), tl.load(token_of + row)
    is_kept = tl.load(kept + assignment) != 0
    scale = tl.where(is_kept, tl.load(weight + assignment), 0.0)
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        d = tl.load(dout + token * width + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(rows + row * width + column, mask=inside & is_kept, other=0.0).to(tl.float32)
        tl.store(drows + row * width + column, d * scale, mask=inside)
        along += d * y
    tl.store(dweight + assignment, tl.sum(along))


def swiglu_forward(both: Tensor) -> Tensor:
    """(R, 2F), gate before up, contiguous -> (R, F)."""
    count, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty((count, width))
    if count:
        _swiglu_forward[(count, triton.cdiv(width, BLOCK))](both, out, width, BLOCK=BLOCK)
    return out


def swiglu_backward(both: Tensor, dout: Tensor) -> Tensor:
    """The gradient (R, 2F) of ``swiglu_forward`` from dout (R, F), contiguous."""
    result = torch.empty_like(both)
    count, width = dout.shape
    if count:
        _swiglu_backward[(count, triton.cdiv(width, BLOCK))](both, dout, result, width, BLOCK=BLOCK)
    return result


def combine_forward(rows: Tensor, row_TK: Tensor, kept_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """(T, D): per token the sum of its kept rows (R, D), in the order of choices, times their float32 weights."""
    T, K = row_TK.shape
    out = rows.new_empty((T, rows.shape[1]))
    if T:
        grid = (T, triton.cdiv(rows.shape[1], BLOCK))
        weight = row_TK if weight_TK is None else weight_TK.contiguous()
        _combine[grid](
            rows,
            row_TK,
            weight,
            kept_TK.contiguous().view(torch.uint8),
            out,
            rows.shape[1],
            K=K,
            WEIGHTED=weight_TK is not None,
            BLOCK=BLOCK,
        )
    return out


def combine_backward(
    rows: Tensor, dout: Tensor, order: Tensor, token: Tensor, weight_TK: Tensor, kept_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``combine_forward``: of rows (R, D) and of weights (T, K) float32, in one pass over both."""
    drows, dweight = torch.empty_like(rows), torch.zeros_like(weight_TK, dtype=torch.float32)
    if rows.shape[0]:
        _combine_backward[(rows.shape[0],)](
            rows,
            dout,
            order,
            token,
            weight_TK.contiguous(),
            kept_TK.contiguous().view(torch.uint8),
            drows,
            dweight,
            rows.shape[1],
            BLOCK=BLOCK,
        )
    return drows, dweight
