# SPDX-License-Identifier: Apache-2.0
"""Operators on Ascend's fused kernels, with the signatures of ``ms.ops.portable`` and ``portable_attention``.

Nothing here has been computed on an NPU: MindSpore's Ascend compiler accepts these cells (``tools/dryrun.py``,
tests/mf/test_ascend_ops.py), and how they use a kernel (layout, mask, which half is gated, drop order) is tested on the
CPU with the kernel replaced by its documented formula. The kernels' own rounding and speed are not known.

Every cell works on one device's slice; how the slices lie is the row of the portable cell in ``ms.strategies``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import FlashAttentionScore, GroupedMatmul, RotaryPositionEmbedding, Swiglu, TopKRouter

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.ops.portable_documents import document_ends

MASK_WIDTH = 2048  # of the mask that stands for any longer causal one (FlashAttentionScore, sparse_mode 2)
LEFT_UP_CAUSAL, WHOLE_MASK, BAND = 2, 0, 4  # sparse_mode
HEAD_MULTIPLE, HEAD_LIMIT = 16, 512  # FlashAttentionScore: D is a multiple of 16 up to 512
ROPE_LIMIT = 896  # RotaryPositionEmbedding: D < 896
KDROP, SDROP = 1, 0  # drop_type of TopKRouter


class RmsNormKernel(nn.Cell):
    """As ``RmsNormOp``, by RmsNorm."""

    def __init__(self, width: int, eps: float, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm = P.RmsNorm(eps)

    def construct(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        y_TD, _ = self.norm(ops.cast(x_TD, self.dtype), ops.cast(weight, self.dtype))
        return ops.cast(y_TD, x_TD.dtype)


class SwiGluKernel(nn.Cell):
    """As ``SwiGluOp``, by Swiglu, which gates the first half of one tensor: the two products are put side by side.

    That copy costs what the kernel saves; it pays where silu and product are not fused by the graph compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.concat = P.Concat(axis=-1)
        self.swiglu = Swiglu()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.swiglu(self.concat((gate, up)), -1)


class RotaryKernel(nn.Cell):
    """As ``RotaryOp``, by RotaryPositionEmbedding: x is BSND, cos and sin are 1S1D, mode 0 turns halves."""

    def __init__(self, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.rotary = RotaryPositionEmbedding()

    def construct(self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        return ops.cast(self.rotary(ops.cast(x_BSHP, self.dtype), cos_SP, sin_SP, 0), x_BSHP.dtype)

    def bprop(
        self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A rotation's transpose is the rotation back. The kernel's own gradient also computes that of the tables.
        dx = self.rotary(ops.cast(dout, self.dtype), cos_SP, -sin_SP, 0)
        return ops.cast(dx, x_BSHP.dtype), ops.zeros_like(cos_SP), ops.zeros_like(sin_SP)


@functools.cache
def hidden_keys(seq_length: int, window: int | None = None) -> Tensor:
    """uint8 mask, 1 where a key is hidden: (S, S), or the 2048 x 2048 corner that stands for a longer one, of which
    the kernel reads the triangle alone."""
    width = min(seq_length, MASK_WIDTH)
    hidden = np.triu(np.ones((width, width), np.uint8), 1)
    if window is not None and seq_length <= MASK_WIDTH:
        hidden |= np.tril(np.ones((width, width), np.uint8), -window)
    return Tensor(hidden)


class FlashAttentionOp(nn.Cell):
    """As ``CausalAttentionOp``, by FlashAttentionScore (Dao et al. 2022) in layout BSH.

    It finds the number of key heads from the widths, and computes its softmax in float32 whatever is asked. A window
    shorter than the text is a band of ``pre_tokens`` before the diagonal (sparse_mode 4), or stands in the whole mask.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        seq_length: int,
        softmax_dtype: ms.Type,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if window is not None and window >= seq_length:
            window = None
        self.hidden = hidden_keys(seq_length, window)
        long_mode = LEFT_UP_CAUSAL if window is None else BAND
        before = {} if window is None or seq_length <= MASK_WIDTH else {"pre_tokens": window - 1}
        self.attend = FlashAttentionScore(
            head_num=heads,
            scale_value=1.0 / math.sqrt(head_dim),
            input_layout="BSH",
            next_tokens=0,  # what sparse_mode 0 needs to know of the mask; the others ignore it
            sparse_mode=long_mode if seq_length > MASK_WIDTH else WHOLE_MASK,
            **before,
        )

    def construct(self, q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        _, _, _, mixed_BSD = self.attend(q_BSD, k_BSD, v_BSD, None, None, None, self.hidden)
        return mixed_BSD


class PackedFlashOp(nn.Cell):
    """As ``PackedAttentionOp``, by FlashAttentionScore of variable length (layout TND): it computes nothing between
    documents. As many lengths whatever a row holds: its 128 documents, most of no token, and its padding."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        seq_length: int,
        softmax_dtype: ms.Type,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        if window is not None and window >= seq_length:
            window = None
        self.hidden = hidden_keys(MASK_WIDTH + 1)
        self.join = P.Concat(axis=1)
        self.attend = FlashAttentionScore(
            head_num=heads,
            scale_value=1.0 / math.sqrt(head_dim),
            input_layout="TND",
            next_tokens=0,
            sparse_mode=LEFT_UP_CAUSAL if window is None else BAND,
            **({} if window is None else {"pre_tokens": window - 1}),
        )

    def construct(self, q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, documents_BS: Tensor) -> Tensor:
        B, S, _ = q_BSD.shape
        ends = self.join((document_ends(documents_BS), ops.full((B, 1), S, dtype=ms.int32)))
        row_B = ops.reshape(ops.arange(B, dtype=ms.int32), (-1, 1))
        ends = ops.cast(ops.reshape(ends + row_B * S, (-1,)), ms.int64)
        q = ops.reshape(q_BSD, (-1, self.heads, self.head_dim))
        k = ops.reshape(k_BSD, (-1, self.kv_heads, self.head_dim))
        v = ops.reshape(v_BSD, (-1, self.kv_heads, self.head_dim))
        _, _, _, mixed = self.attend(q, k, v, None, None, None, self.hidden, None, ends, ends)
        return ops.reshape(mixed, q_BSD.shape)


class TopKRouterSlots(nn.Cell):
    """Slots of a fixed capacity by TopKRouter, in one kernel; see ``ms.moe.slots.CapacitySlots``.

    Inputs: experts (G, N, K) int32, slots per expert C. Outputs: dispatch (G, E, C); combine (G, N, K), which is
    expert * (1 + C) + 1 + position, position part 0 where dropped; assignment (G, E, C).
    """

    def __init__(self, experts: int, chosen: int, sequence_order: bool) -> None:
        super().__init__()
        self.experts = experts
        self.drop_type = SDROP if sequence_order else KDROP
        self.topkrouter = TopKRouter()
        self.first_E = Tensor(np.arange(experts, dtype=np.int32).reshape(1, 1, experts))
        self.expert_E = Tensor(np.arange(experts, dtype=np.int32).reshape(1, experts, 1))
        self.choices = range(1, chosen)
        self.chosen = chosen
        self.split = P.Split(axis=2, output_num=chosen)
        self.gather = P.Gather(batch_dims=1)

    def counts(self, index_GNK: Tensor) -> Tensor:
        """Assignments per expert (G, E) int32, before dropping."""
        flat = ops.reshape(index_GNK, (index_GNK.shape[0], -1, 1))
        chosen_GTE = ops.cast(flat == self.first_E, ms.float32)  # exact: counts stay below 2^24
        return ops.cast(chosen_GTE.sum(1), ms.int32)

    def construct(self, index_GNK: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        dispatch_GEC, combine_GNK = self.topkrouter(index_GNK, capacity, self.experts, self.drop_type)
        token_GEC = ops.maximum(dispatch_GEC - 1, 0)
        # The choice by which a slot's token came to this expert; a token chooses an expert once.
        columns, choice_GEC = self.split(index_GNK), ops.zeros_like(token_GEC)
        for j in self.choices:
            expert_GN = ops.squeeze(columns[j], 2)
            came = ops.cast(self.gather(expert_GN, token_GEC, 1) == self.expert_E, ms.int32)
            choice_GEC = choice_GEC + j * came
        filled_GEC = ops.cast(dispatch_GEC > 0, ms.int32)
        return dispatch_GEC, combine_GNK, (token_GEC * self.chosen + choice_GEC) * filled_GEC


class GroupedProductKernel(nn.Cell):
    """As ``GroupedProductOp``, by GroupedMatmul (rows split by group, one result).

    The kernel reads its matrices as (E, in, out) and MindSpore 2.9 cannot tell it that they are transposed; they are
    copied the other way round before each product, so that checkpoints are those of experts with slots.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.product = GroupedMatmul(split_item=3, group_type=0)
        self.transpose = P.Transpose()

    def construct(self, x_TD: Tensor, weight: Tensor, end_E: Tensor) -> Tensor:
        turned = self.transpose(weight, (0, 2, 1))
        return self.product([x_TD], [turned], None, None, None, None, None, end_E)[0]


def attention_unfit(spec: NetworkSpec) -> str:
    """Why FlashAttentionScore cannot take this network's tensors; '' when it can."""
    head_dim = spec.model.head_dim
    if spec.numerics.compute_dtype == "float32":
        return "FlashAttentionScore takes float16 and bfloat16, compute_dtype is float32"
    if head_dim % HEAD_MULTIPLE or head_dim > HEAD_LIMIT:
        return f"FlashAttentionScore takes heads of a multiple of {HEAD_MULTIPLE} up to {HEAD_LIMIT}, not {head_dim}"
    return ""


def rope_unfit(spec: NetworkSpec) -> str:
    """Why RotaryPositionEmbedding cannot take this network's tensors; '' when it can."""
    head_dim = spec.model.head_dim
    if spec.model.rope.follows_length:
        return "RotaryPositionEmbedding takes one table for all rows, dynamic scaling turns each by its length"
    return "" if head_dim < ROPE_LIMIT else f"RotaryPositionEmbedding takes heads below {ROPE_LIMIT}, not {head_dim}"


def router_unfit(spec: NetworkSpec) -> str:
    """Why TopKRouter cannot place this network's tokens; '' when it can."""
    return "" if spec.model.routing.capacity_factor > 0 else "TopKRouter needs a fixed capacity (capacity_factor > 0)"


def fits(spec: NetworkSpec) -> str:
    """For kernels that take every network."""
    return ""


@dataclass(frozen=True)
class FusedKernel:
    """A fused cell: the field of ``Operators`` it fills, whether a spec asks for it, and why it may not fit."""

    field: str
    switch: str
    asked: Callable[[NetworkSpec], bool]
    cell: type[nn.Cell]
    unfit: Callable[[NetworkSpec], str] = fits


FUSED = (
    FusedKernel(
        "causal_attention",
        "use_flash_attention",
        lambda spec: spec.kernels.flash_attention,
        FlashAttentionOp,
        attention_unfit,
    ),
    FusedKernel(
        "packed_attention",
        "use_flash_attention",
        lambda spec: spec.kernels.flash_attention,
        PackedFlashOp,
        attention_unfit,
    ),
    FusedKernel("rms_norm", "fused_rms_norm", lambda spec: spec.kernels.rms_norm, RmsNormKernel),
    FusedKernel("rotary", "use_fused_rope", lambda spec: spec.kernels.rope, RotaryKernel, rope_unfit),
    FusedKernel("swiglu", "use_fused_swiglu", lambda spec: spec.kernels.swiglu, SwiGluKernel),
    FusedKernel(
        "slots",
        "use_fused_ops_topkrouter",
        lambda spec: spec.model.moe is not None and spec.model.moe.use_fused_ops_topkrouter,
        TopKRouterSlots,
        router_unfit,
    ),
    FusedKernel(
        "grouped_product",
        "use_gmm",
        lambda spec: spec.model.moe is not None and spec.model.moe.use_gmm,
        GroupedProductKernel,
    ),
)


def fused_cells(spec: NetworkSpec) -> tuple[dict[str, type[nn.Cell]], list[str]]:
    """Cells by field of ``Operators`` that ``spec`` asks for, and one line per switch that cannot be followed."""
    cells: dict[str, type[nn.Cell]] = {}
    notes = []
    for kernel in FUSED:
        if not kernel.asked(spec):
            continue
        reason = kernel.unfit(spec)
        if reason:
            notes.append(f"{kernel.switch}: portable operators instead, {reason}")
        else:
            cells[kernel.field] = kernel.cell
    return cells, list(dict.fromkeys(notes))
