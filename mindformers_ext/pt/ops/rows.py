# SPDX-License-Identifier: Apache-2.0
"""Tokens to rows sorted by expert, and back. Gathers in both directions, so gradients are deterministic everywhere.

An assignment is one (token, choice). ``Sorted`` pairs assignments with rows one to one; those that were dropped stand
behind the last offset, where products write nothing, and are masked by ``torch.where`` (0 * NaN is NaN).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindformers_ext.pt.ops.fused import fused


class Sorted(NamedTuple):
    """Where everything lies: row_TK (T, K) row of each assignment, token (T*K) token of each row, kept_TK (T, K)
    bool, order (T*K) assignment of each row, offs_E (E) int32 inclusive ends of the experts' rows."""

    row_TK: Tensor
    token: Tensor
    kept_TK: Tensor
    order: Tensor
    offs_E: Tensor


def sort_by_expert(expert_TK: Tensor, kept_TK: Tensor | None, experts: int) -> Sorted:
    """Rows in the order of experts, then of assignments; ``kept_TK`` None keeps all."""
    T, K = expert_TK.shape
    key = expert_TK if kept_TK is None else torch.where(kept_TK, expert_TK, experts)
    key = key.reshape(-1)
    _, order = torch.sort(key, stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(T * K, device=key.device)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=key.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offs_E = counts[:experts].cumsum(0).to(torch.int32)
    kept = torch.ones((T, K), dtype=torch.bool, device=key.device) if kept_TK is None else kept_TK
    return Sorted(row.view(T, K), order // max(K, 1), kept, order, offs_E)


def _summed(rows: Tensor, place: Sorted, weight_TK: Tensor | None) -> Tensor:
    """Per token the sum over its kept assignments of (weight *) row, one choice after the other: (T, D)."""
    if fused(rows):
        from mindformers_ext.pt.ops.triton_kernels import combine_forward

        return combine_forward(rows.contiguous(), place.row_TK, place.kept_TK, weight_TK)
    total: Tensor | None = None
    for k in range(place.row_TK.shape[1]):
        part = rows.index_select(0, place.row_TK[:, k])
        if weight_TK is not None:
            part = part * weight_TK[:, k, None].to(rows.dtype)
        part = torch.where(place.kept_TK[:, k, None], part, part.new_zeros(()))
        total = part if total is None else total + part
    assert total is not None
    return total


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *place: Tensor) -> Tensor:
        ctx.save_for_backward(*place)
        return x_TD.index_select(0, Sorted(*place).token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (_summed(gradients[0], Sorted(*ctx.saved_tensors), None), *(None,) * 5)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_TK: Tensor, *place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight_TK, *place)
        return _summed(rows, Sorted(*place), weight_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_TK, *saved = ctx.saved_tensors
        place, dout = Sorted(*saved), gradients[0]
        if fused(rows):
            from mindformers_ext.pt.ops.triton_kernels import combine_backward

            drows, dweight = combine_backward(
                rows, dout.contiguous(), place.order, place.token, weight_TK, place.kept_TK
            )
            return (drows, dweight.to(weight_TK.dtype), *(None,) * 5)
        kept = torch.where(place.kept_TK, weight_TK, weight_TK.new_zeros(()))
        weight = kept.reshape(-1).index_select(0, place.order)
        drows = dout.index_select(0, place.token) * weight[:, None].to(dout.dtype)
        along = [
            (rows.index_select(0, place.row_TK[:, k]) * dout).sum(-1, dtype=torch.float32)
            for k in range(weight_TK.shape[1])
        ]
        dweight = torch.stack(along, -1).to(weight_TK.dtype)
        dweight = torch.where(place.kept_TK, dweight, dweight.new_zeros(()))
        return (drows, dweight, *(None,) * 5)


def dispatch(x_TD: Tensor, place: Sorted) -> Tensor:
    """Rows (T*K, D): a copy of each assignment's token."""
    return _Dispatch.apply(x_TD, *place)


def combine(rows: Tensor, weight_TK: Tensor, place: Sorted) -> Tensor:
    """(T, D): each token's rows times their weights, in the order of choices. Dropped assignments add exactly 0."""
    return _Combine.apply(rows, weight_TK, *place)
