# SPDX-License-Identifier: Apache-2.0
"""Compares the Triton kernels with their twins in plain torch; run by ``test_triton`` with TRITON_INTERPRET=1."""

from __future__ import annotations

import torch

from mindformers_ext.pt.ops import triton_kernels as kernels
from mindformers_ext.pt.ops.rows import Sorted, combine, dispatch, sort_by_expert
from mindformers_ext.pt.ops.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(name: str, ours: torch.Tensor, twin: torch.Tensor, limit: float) -> None:
    """Largest difference relative to the twin's largest value."""
    scale = float(twin.detach().abs().max()) if twin.numel() else 1.0
    difference = float((ours - twin).detach().abs().max()) / max(scale, 1e-12) if twin.numel() else 0.0
    print(f"{name} {tuple(twin.shape)} {twin.dtype} {difference:.1e}")
    assert ours.shape == twin.shape and ours.dtype == twin.dtype and difference <= limit, name


def check_swiglu(count: int, width: int, dtype: torch.dtype, limit: float) -> None:
    both = torch.randn(count, 2 * width, dtype=dtype, device=DEVICE, requires_grad=True)
    dout = torch.randn(count, width, dtype=dtype, device=DEVICE)
    twin = swiglu(both)
    (gradient,) = torch.autograd.grad(twin, both, dout)
    compare("swiglu", kernels.swiglu_forward(both.detach()), twin.detach(), limit)
    compare("swiglu gradient", kernels.swiglu_backward(both.detach(), dout), gradient, limit)


def check_combine(tokens: int, chosen: int, width: int, dtype: torch.dtype, limit: float) -> None:
    expert = torch.randint(0, 5, (tokens, chosen), device=DEVICE)
    kept = torch.rand(tokens, chosen, device=DEVICE) > 0.3
    place: Sorted = sort_by_expert(expert, kept, 5)
    rows = torch.randn(tokens * chosen, width, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.rand(tokens, chosen, device=DEVICE, requires_grad=True)
    dout = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
    twin = combine(rows, weight, place)
    drows, dweight = torch.autograd.grad(twin, (rows, weight), dout)
    poisoned = rows.detach().clone()
    poisoned[int(place.offs_E[-1]) :] = float("nan")
    found = kernels.combine_forward(poisoned, place.row_TK, place.kept_TK, weight.detach())
    compare("combine", found, twin.detach(), limit)
    again = kernels.combine_forward(poisoned, place.row_TK, place.kept_TK, weight.detach())
    assert torch.equal(found, again)
    ours = kernels.combine_backward(poisoned, dout, place.order, place.token, weight.detach(), place.kept_TK)
    compare("combine, rows' gradient", ours[0], drows, limit)
    compare("combine, weights' gradient", ours[1], dweight, 10 * limit)
    x = torch.randn(tokens, width, dtype=dtype, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(dispatch(x, place), x, rows.detach())
    compare("dispatch's gradient", kernels.combine_forward(poisoned, place.row_TK, place.kept_TK, None), dx, limit)


def main() -> None:
    torch.manual_seed(0)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        for count, width in ((5, 24), (3, 1500), (0, 8)):
            check_swiglu(count, width, dtype, limit)
        for tokens, chosen, width in ((7, 2, 16), (4, 3, 1030), (0, 2, 8)):
            check_combine(tokens, chosen, width, dtype, limit)
    print("all kernels equal their twins")


if __name__ == "__main__":
    main()
