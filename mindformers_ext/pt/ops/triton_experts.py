# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for whole experts on few rows: products that fetch tokens themselves, and the sum per token.

Beside grouped products three passes over the rows go away (idea: ScatterMoE, Tan et al. 2024): rows are read through
their token number, SwiGLU is taken before anything is stored, and so is the product with the gate's weight. Tiles of 16
rows, and an inner width cut over programs, let one token per expert stream its weights through all of the GPU. Counts
stay on the GPU: the grid is an upper bound of the tiles, so a CUDA graph holds it. No atomics: two runs are equal to
the last bit. Twins in plain torch stand in ``gathered``. Imported on a GPU only.

No GPU has timed these kernels: the sizes in ``TILES`` are reasoned, not tuned. What is tested is their arithmetic, in
Triton's interpreter, and that they compile for compute capability 9.0 within its shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns that one program of the sum takes
PROGRAMS = 512  # wanted in a grid: several for each of some 130 multiprocessors
MOST_PARTS = 8  # into which the inner width is cut


@dataclass(frozen=True)
class Tile:
    """What one program computes: rows x columns of a result, ``inner`` 16-bit elements of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# (mean rows per expert up to which it holds, tile)
TILES = ((16, Tile(16, 32, 128, 4, 4)), (64, Tile(64, 64, 64, 4, 4)), (None, Tile(128, 128, 64, 8, 3)))


def tile_of(rows: int, experts: int, itemsize: int) -> Tile:
    """The tile for so many rows in all; wider elements come in shorter pieces, for the same shared memory."""
    tile = next(tile for limit, tile in TILES if limit is None or rows <= limit * experts)
    return replace(tile, inner=max(16, tile.inner * 2 // itemsize))


def most_tiles(rows: int, experts: int, height: int) -> int:
    """Tiles of ``height`` rows that rows over experts can need: each expert that has rows ends in at most one part."""
    return rows // height + min(rows, experts)


def parts_of(ffn: int, programs: int, inner: int) -> int:
    """Into how many parts the inner width is cut, so that a small grid fills the GPU."""
    return max(1, min(MOST_PARTS, PROGRAMS // max(programs, 1), triton.cdiv(ffn, inner)))


def _constants(tile: Tile) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "WIDEN": triton.knobs.runtime.interpret,
    }


@triton.jit
def _span(offs, tile, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of a tile's expert; past the last tile the end is 0."""
    e = tl.arange(0, EXPERTS)
    known = e < experts
    end = tl.load(offs + e, mask=known, other=0)
    start = tl.load(offs + e - 1, mask=known & (e > 0), other=0)
    tiles = tl.where(known, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - last + tiles) * ROWS, 0), 0)
    return expert.to(tl.int64), first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _product(a, b, total, WIDEN: tl.constexpr):
    """total + a b in float32; exact float32 operands too, no TF32."""
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _gather_swiglu(
    x,
    w,
    token_of,
    offs,
    out,
    hidden,
    ffn,
    experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    expert, first, end = _span(offs, tl.program_id(0), experts, EXPERTS, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, wide = row < end, column < ffn
    token = tl.load(token_of + row, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, INNER)
    x_at = x + token[:, None] * hidden + k[None, :]
    gate_at = w + (expert * 2 * ffn + column)[None, :] * hidden + k[:, None]
    up_at = w + (expert * 2 * ffn + ffn + column)[None, :] * hidden + k[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, INNER):
        within = k < hidden - start
        part = tl.load(x_at + start, mask=inside[:, None] & within[None, :], other=0.0)
        valid = within[:, None] & wide[None, :]
        gate = _product(part, tl.load(gate_at + start, mask=valid, other=0.0), gate, WIDEN)
        up = _product(part, tl.load(up_at + start, mask=valid, other=0.0), up, WIDEN)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row.to(tl.int64)[:, None] * ffn + column[None, :], result, mask=inside[:, None] & wide[None, :])


@triton.jit
def _down_scatter(
    h,
    w,
    weight,
    order,
    offs,
    out,
    hidden,
    ffn,
    experts,
    assignments,
    share,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    expert, first, end = _span(offs, tl.program_id(0), experts, EXPERTS, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, wide = row < end, column < hidden
    k = tl.arange(0, INNER)
    h_at = h + row.to(tl.int64)[:, None] * ffn + k[None, :]
    w_at = w + (expert * hidden + column)[None, :] * ffn + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    low = tl.program_id(2) * share
    for start in range(low, tl.minimum(low + share, ffn), INNER):  # share: whole pieces, so only ffn cuts one
        within = k < ffn - start
        part = tl.load(h_at + start, mask=inside[:, None] & within[None, :], other=0.0)
        valid = within[:, None] & wide[None, :]
        total = _product(part, tl.load(w_at + start, mask=valid, other=0.0), total, WIDEN)
    assignment = tl.load(order + row, mask=inside, other=0).to(tl.int64)
    total = total * tl.load(weight + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = tl.program_id(2).to(tl.int64) * assignments + assignment
    tl.store(out + place[:, None] * hidden + column[None, :], total, mask=inside[:, None] & wide[None, :])


@triton.jit
def _sum_slots(
    slots,
    kept,
    out,
    width,
    assignments,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        is_kept = tl.load(kept + token * K + k) != 0
        for part in tl.static_range(PARTS):
            at = (part * assignments + token * K + k) * width  # int64, as token is
            total += tl.load(slots + at + column, mask=inside & is_kept, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total, mask=inside)


def gather_swiglu(x: Tensor, gate_up: Tensor, token: Tensor, offs_E: Tensor, tile: Tile | None = None) -> Tensor:
    """(R, F): silu(gate) * up of the rows' tokens, x (T, D), gate_up (E, 2F, D), token (R), offs_E as in ``rows``.

    Contiguous operands. Rows at or past the last offset are not written.
    """
    (experts, ffn, hidden), rows = gate_up.shape, token.shape[0]
    ffn //= 2
    out = x.new_empty((rows, ffn))
    if rows:
        tile = tile or tile_of(rows, experts, x.itemsize)
        height = most_tiles(rows, experts, tile.rows)
        if height * triton.cdiv(ffn, tile.columns) < PROGRAMS:
            tile = replace(tile, columns=max(16, tile.columns // 2))
        _gather_swiglu[(height, triton.cdiv(ffn, tile.columns))](
            x,
            gate_up,
            token,
            offs_E,
            out,
            hidden,
            ffn,
            experts,
            EXPERTS=triton.next_power_of_2(experts),
            **_constants(tile),
        )
    return out


def down_scatter(
    h: Tensor,
    down: Tensor,
    weight_TK: Tensor,
    order: Tensor,
    offs_E: Tensor,
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """(P, T*K, D): each row of h (R, F) times its expert's down (E, D, F) and its weight, at its assignment's place.

    The sum over F is cut into P parts, float32 when there are several, else of h's type. Contiguous operands.
    Assignments behind the last offset are not written.
    """
    (experts, hidden, ffn), rows = down.shape, h.shape[0]
    tile = tile or tile_of(rows, experts, h.itemsize)
    height, columns = most_tiles(rows, experts, tile.rows), triton.cdiv(hidden, tile.columns)
    share = triton.cdiv(ffn, parts or parts_of(ffn, height * columns, tile.inner))
    share = triton.cdiv(share, tile.inner) * tile.inner
    parts = triton.cdiv(ffn, share)
    out = h.new_empty((parts, rows, hidden), dtype=torch.float32 if parts > 1 else h.dtype)
    if rows:
        _down_scatter[(height, columns, parts)](
            h,
            down,
            weight_TK,
            order,
            offs_E,
            out,
            hidden,
            ffn,
            experts,
            rows,
            share,
            EXPERTS=triton.next_power_of_2(experts),
            **_constants(tile),
        )
    return out


def sum_slots(slots: Tensor, kept_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, D): per token the parts (P, T*K, D) of its kept assignments, choice after choice, summed in float32."""
    (T, K), (parts, rows, width) = kept_TK.shape, slots.shape
    out = slots.new_empty((T, width), dtype=dtype)
    if T:
        _sum_slots[(T, triton.cdiv(width, BLOCK))](
            slots, kept_TK.contiguous().view(torch.uint8), out, width, rows, K=K, PARTS=parts, BLOCK=BLOCK
        )
    return out
