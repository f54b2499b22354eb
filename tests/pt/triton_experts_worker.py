# SPDX-License-Identifier: Apache-2.0
"""Compares the kernels of whole experts with their twins; run by ``test_triton`` with TRITON_INTERPRET=1 on a CPU.

Memory that torch hands out is filled with NaN, so whatever a kernel reads without having written it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindformers_ext.pt.ops import gathered
from mindformers_ext.pt.ops import triton_experts as kernels
from mindformers_ext.pt.ops.rows import Sorted, sort_by_expert

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernels.Tile(16, 16, 16, 4, 2)


@dataclass(frozen=True)
class Case:
    """Sizes of one layer; ``used``: experts that tokens may choose; ``tile`` and ``parts`` None: by the kernels."""

    tokens: int
    experts: int
    chosen: int
    hidden: int
    ffn: int
    dtype: torch.dtype = torch.float32
    used: int | None = None
    drop: float = 0.0
    tile: kernels.Tile | None = SMALL
    parts: int | None = None


CASES = (
    Case(7, 5, 2, 32, 16),  # whole tiles across, part of one in height
    Case(24, 4, 2, 20, 24, used=2, drop=0.25),  # several tiles of an expert, two without tokens, cut widths
    Case(24, 4, 2, 20, 24, torch.bfloat16, used=2, drop=0.25),
    Case(20, 6, 1, 17, 19, used=2),  # odd widths
    Case(4, 3, 3, 24, 90, torch.bfloat16, parts=3),  # the inner width cut over programs
    Case(70, 2, 1, 70, 30, tile=kernels.TILES[1][1]),  # the larger tiles of the table
    Case(3, 16, 4, 40, 24, tile=None),  # as decoding calls them
    Case(3, 16, 4, 40, 24, torch.bfloat16, tile=None),
    Case(3, 16, 4, 40, 24, torch.float16, tile=None),
    Case(0, 4, 2, 16, 16),
    Case(6, 4, 2, 16, 16, drop=1.0),  # nothing kept
)


def bits(ours: Tensor, twin: Tensor, what: str, ulps: int, scale: Tensor | None = None) -> float:
    """Largest difference: float32 relative to the largest value (at most 1e-5), 16-bit types in units in the last
    place of the element, or of ``scale``."""
    assert ours.shape == twin.shape and ours.dtype == twin.dtype and torch.isfinite(ours).all(), what
    if not twin.numel():
        return 0.0
    difference = (ours.double() - twin.double()).abs()
    if twin.dtype == torch.float32:
        found, limit = float(difference.max() / twin.abs().max().clamp_min(1e-30)), 1e-5
    else:
        size = (twin if scale is None else scale).double().abs().clamp_min(1e-3)
        last = torch.exp2(size.log2().floor()) * torch.finfo(twin.dtype).eps
        found, limit = float((difference / last).max()), ulps
    assert found <= limit, (what, found, limit)
    return found


def layer(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Sorted]:
    """x, gate_up, down, weights and where the rows lie; tokens that lost all their choices are NaN."""
    T, K, E = case.tokens, case.chosen, case.experts
    expert_TK = torch.rand(T, case.used or E, device=DEVICE).argsort(1)[:, :K]
    kept_TK = torch.rand(T, K, device=DEVICE) >= case.drop
    place = sort_by_expert(expert_TK, kept_TK, E)
    x = torch.randn(T, case.hidden, device=DEVICE)
    x[~kept_TK.any(1)] = float("nan")
    gate_up = torch.randn(E, 2 * case.ffn, case.hidden, device=DEVICE) * case.hidden**-0.5
    down = torch.randn(E, case.hidden, case.ffn, device=DEVICE) * case.ffn**-0.5
    weight_TK = torch.rand(T, K, device=DEVICE)
    return x.to(case.dtype), gate_up.to(case.dtype), down.to(case.dtype), weight_TK, place


def check(case: Case) -> None:
    x, gate_up, down, weight_TK, place = layer(case)
    end = int(place.offs_E[-1])
    twin = gathered.plain_gather_swiglu(x, gate_up, place.token, place.offs_E)
    h = kernels.gather_swiglu(x, gate_up, place.token, place.offs_E, case.tile)
    assert h[end:].isnan().all(), "rows past the last offset were written"
    first = bits(h[:end], twin[:end], "gather_swiglu", 1)
    wanted = gathered.plain_down_sum(twin, down, weight_TK, place)
    runs = []
    for _ in range(2):
        slots = kernels.down_scatter(twin, down, weight_TK, place.order, place.offs_E, case.tile, case.parts)
        assert case.parts is None or slots.shape[0] == case.parts and slots.dtype == torch.float32
        runs.append(kernels.sum_slots(slots, place.kept_TK, x.dtype))
    size = wanted.float().abs().amax(1, keepdim=True).expand_as(wanted) if case.tokens else None
    second = bits(runs[0], wanted, "down", 2, size)
    assert torch.equal(runs[0], runs[1]), "two runs differ"
    assert torch.all(runs[0][~place.kept_TK.any(1)] == 0)
    print(f"experts {case} h {first:.1e} out {second:.1e}", flush=True)


def check_whole() -> None:
    """The function that the network calls, forward by kernels and gradients, against grouped products."""
    gathered.fused = lambda tensor: True  # the kernels, on a CPU in the interpreter
    x, gate_up, down, weight_TK, place = layer(Case(9, 6, 2, 24, 40, used=4))
    dout = torch.randn_like(x)
    results = []
    for run in (gathered.gathered_experts, gathered.gathered_experts, gathered.grouped_experts):
        inputs = [t.clone().requires_grad_() for t in (x, gate_up, down, weight_TK)]
        out = run(*inputs, place)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True)), "two runs differ"
    for ours, theirs in zip(results[0], results[2], strict=True):
        bits(ours, theirs, "whole", 1)


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.randn(3).new_empty(3).isnan().all()
    for case in CASES:
        check(case)
    check_whole()
    print("all experts equal their twins")


if __name__ == "__main__":
    main()
