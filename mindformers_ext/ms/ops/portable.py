# SPDX-License-Identifier: Apache-2.0
"""Operators built from primitives that every MindSpore back end has (CPU, GPU and Ascend).

Measured on CPU with MindSpore 2.9: element-wise kernels and matrix products run at the machine's speed, reductions
along an axis run on one thread at a tenth of it. Sums over an axis are therefore products with a vector of ones. An
element-wise kernel whose operands differ in shape is six times slower than with equal shapes, and some keep two 64-bit
indices per element for as long as the graph lives: operands are spread by ``broadcast_to`` first, a third of the time.
Gradients are written out where automatic differentiation would scatter or reduce needlessly.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import TensorToScalar


class SquareSumOp(nn.Cell):
    """Sum of squares in float32, as a product of the flat tensor with itself. Output (1)."""

    def __init__(self) -> None:
        super().__init__()
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        row = ops.reshape(ops.cast(x, ms.float32), (1, -1))
        return ops.reshape(self.product(row, row), (1,))


class ReducedSquareSumOp(nn.Cell):
    """Sum of squares in float32 by a reduction, which keeps a sharded tensor in place. Output (1).

    MindSpore's semi-auto parallel adds up the parts of a sharded gradient where it finds ``grad_scale``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.as_vector = P.ExpandDims().add_prim_attr("grad_scale", True)

    def construct(self, x: Tensor) -> Tensor:
        return self.as_vector(ops.reduce_sum(ops.square(ops.cast(x, ms.float32))), 0)


def outer_product() -> P.Primitive:
    """(T, 1) and (1, D) -> (T, D).

    On CPU a matrix product, ten times as fast there as a product that spreads both; other devices spread, since their
    matrix units may round.
    """
    return P.MatMul() if ms.get_context("device_target") == "CPU" else P.Mul()


class RmsNormOp(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang and Sennrich 2019), statistics in ``dtype``.

    Inputs: ``x`` (rows, D), ``weight`` (D). Output: (rows, D) in the type of ``x``. What scales a row and what scales a
    column become one factor, an outer product, which is written faster than either is spread.
    """

    def __init__(self, width: int, eps: float, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.eps = eps
        self.dtype = dtype
        self.mean_D = Tensor(np.full((width, 1), 1.0 / width), dtype)
        self.ones_D = Tensor(np.ones((1, width)), dtype)
        self.inverse_width = 1.0 / width
        self.column_sum = P.MatMul()
        self.row_sum = P.MatMul(transpose_a=True)
        self.outer = outer_product()

    def _inverse_rms(self, x_TD: Tensor) -> Tensor:
        """(T, 1)."""
        return ops.rsqrt(self.column_sum(ops.square(x_TD), self.mean_D) + self.eps)

    def construct(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        x32_TD = ops.cast(x_TD, self.dtype)
        y_TD = x32_TD * self.outer(self._inverse_rms(x32_TD), ops.reshape(ops.cast(weight, self.dtype), (1, -1)))
        return ops.cast(y_TD, x_TD.dtype)

    def bprop(self, x_TD: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        # with r the inverse root: dx = r w dout - r^3 x mean(w x dout), dw = sum over rows of r x dout
        x32_TD, weight32 = ops.cast(x_TD, self.dtype), ops.cast(weight, self.dtype)
        dout_TD = ops.cast(dout, self.dtype)
        inverse_rms = self._inverse_rms(x32_TD)
        product_TD = x32_TD * dout_TD
        along = self.column_sum(product_TD, ops.reshape(weight32, (-1, 1))) * self.inverse_width
        along = along * inverse_rms * inverse_rms * inverse_rms
        scale_TD = self.outer(inverse_rms, ops.reshape(weight32, (1, -1)))
        dx_TD = dout_TD * scale_TD - x32_TD * self.outer(along, self.ones_D)
        dweight = ops.reshape(self.row_sum(product_TD, inverse_rms), weight.shape)
        return ops.cast(dx_TD, x_TD.dtype), ops.cast(dweight, weight.dtype)


class SwiGluOp(nn.Cell):
    """silu(gate) * up, element by element (Shazeer 2020). Both inputs and the output have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = P.Sigmoid()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.silu(gate) * up

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        # silu' = s + a - a s with s the sigmoid and a = gate * s; no scalar operand, which would be slower on CPU.
        sigmoid = self.sigmoid(gate)
        active = gate * sigmoid
        dgate = dout * up * (sigmoid + active - active * sigmoid)
        return dgate, dout * active


class GroupedProductOp(nn.Cell):
    """Rows times the matrix of their group.

    Inputs: x (T, in) with the rows of each group together, weight (E, out, in), end (E) int64, where each group's rows
    end. Output (T, out); rows behind the last group's are 0. Each group multiplies its own rows, whose number is known
    when the graph runs.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.split = P.Split(axis=0, output_num=groups)
        self.split_ends = P.Split(axis=0, output_num=groups)
        self.slice, self.join, self.stack = P.Slice(), P.Concat(axis=0), P.Stack(axis=0)
        self.to_scalar = TensorToScalar()
        self.product = P.MatMul()
        self.product_nt, self.product_tn = P.MatMul(transpose_b=True), P.MatMul(transpose_a=True)

    def _numbers(self, x_E: Tensor) -> tuple:
        """(E) int64 as numbers of the graph."""
        found: tuple = ()
        for part in self.split_ends(x_E):
            found = found + (self.to_scalar(ops.reshape(part, ())),)
        return found

    def _by_group(self, x_TD: Tensor, weight: Tensor, end_E: Tensor, transposed: bool) -> Tensor:
        """Each row times its group's matrix, or its transpose."""
        T, width = x_TD.shape
        _, columns, own = weight.shape
        out = columns if transposed else own
        first = 0
        y: tuple = ()
        ends, matrices = self._numbers(end_E), self.split(weight)
        for group in range(self.groups):
            rows, matrix = self.slice(x_TD, (first, 0), (ends[group] - first, width)), matrices[group]
            matrix = ops.reshape(matrix, (columns, own))
            y = y + (self.product_nt(rows, matrix) if transposed else self.product(rows, matrix),)
            first = ends[group]
        behind = ops.zeros((T - first, out), x_TD.dtype)
        return ops.reshape(self.join((*y, behind)), (T, out))

    def construct(self, x_TD: Tensor, weight: Tensor, end_E: Tensor) -> Tensor:
        return self._by_group(x_TD, weight, end_E, True)

    def bprop(
        self, x_TD: Tensor, weight: Tensor, end_E: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        T = x_TD.shape[0]
        start_E = ops.concat((ops.zeros((1,), end_E.dtype), end_E[: self.groups - 1]))
        # The product over no rows leaves its memory as it was: an idle group has one row, of zeros, behind all others.
        is_idle_E = ops.cast(start_E == end_E, end_E.dtype)
        firsts = self._numbers(start_E + (T - start_E) * is_idle_E)
        counts = self._numbers(end_E - start_E + is_idle_E)
        x = self.join((x_TD, ops.zeros((1, x_TD.shape[1]), x_TD.dtype)))
        dy = self.join((dout, ops.zeros((1, dout.shape[1]), dout.dtype)))
        dweight: tuple = ()
        for group in range(self.groups):
            at, count = (firsts[group], 0), counts[group]
            own = self.slice(dy, at, (count, dout.shape[1]))
            dweight = dweight + (self.product_tn(own, self.slice(x, at, (count, x_TD.shape[1]))),)
        return self._by_group(dout, weight, end_E, False), self.stack(dweight), ops.zeros_like(end_E)


class RotaryOp(nn.Cell):
    """Rotate-half rotary embedding (Su et al. 2021; the layout of Hugging Face's LLaMA), no complex numbers.

    Inputs: ``x`` (B, S, H, P), ``cos`` and ``sin`` (1, S, 1, P) whose two halves are equal. Output: as ``x``.
    """

    def __init__(self, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.split = P.Split(axis=-1, output_num=2)
        self.concat = P.Concat(axis=-1)
        # elsewhere the compiler would fold the spread tables into constants, 80 MB for every layer of 4096 tokens
        self.spreads = ms.get_context("device_target") == "CPU"

    def _table(self, table_SP: Tensor, shape: tuple) -> Tensor:
        if self.spreads:
            return ops.broadcast_to(table_SP, shape)
        return table_SP

    def _turn(self, x_BSHP: Tensor) -> Tensor:
        low, high = self.split(x_BSHP)
        return self.concat((-high, low))

    def construct(self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        x, shape = ops.cast(x_BSHP, self.dtype), x_BSHP.shape
        cos, sin = self._table(cos_SP, shape), self._table(sin_SP, shape)
        return ops.cast(x * cos + self._turn(x) * sin, x_BSHP.dtype)

    def bprop(
        self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A rotation's transpose is the rotation back; the tables are constants.
        d, shape = ops.cast(dout, self.dtype), x_BSHP.shape
        cos, sin = self._table(cos_SP, shape), self._table(sin_SP, shape)
        dx_BSHP = ops.cast(d * cos - self._turn(d) * sin, x_BSHP.dtype)
        return dx_BSHP, ops.zeros_like(cos_SP), ops.zeros_like(sin_SP)


class TanhOp(nn.Cell):
    """tanh by expm1, to float32's rounding: MindSpore's own on CPU is off by 1e-4. Any shape, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.expm1 = P.Expm1()

    def construct(self, x: Tensor) -> Tensor:
        power = self.expm1(2.0 * ops.minimum(ops.maximum(x, -9.0), 9.0))  # beyond 9 it is 1 to rounding
        return power / (power + 2.0)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout * (1.0 - out * out),)


class SoftplusOp(nn.Cell):
    """log(1 + exp x) by log1p, to float32's rounding. Any shape, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.log1p, self.expm1, self.relu = P.Log1p(), P.Expm1(), P.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        return self.log1p(self.expm1(-ops.abs(x)) + 1.0) + self.relu(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (-dout * self.expm1(-out),)
