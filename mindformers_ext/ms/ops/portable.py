# SPDX-License-Identifier: Apache-2.0
"""Operators built from primitives that every MindSpore back end has (CPU, GPU and Ascend).

Measured on CPU with MindSpore 2.9: element-wise kernels and matrix products run at the machine's speed, reductions
along an axis run on one thread at a tenth of it. Sums over an axis are therefore products with a vector of ones.
Gradients are written out where automatic differentiation would scatter or reduce needlessly.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops


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


class RmsNormOp(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang and Sennrich 2019), statistics in ``dtype``.

    Inputs: ``x`` (rows, D), ``weight`` (D). Output: (rows, D) in the type of ``x``.
    """

    def __init__(self, width: int, eps: float, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.eps = eps
        self.dtype = dtype
        self.inverse_width = 1.0 / width
        self.ones_D = Tensor(np.ones((width, 1)), dtype)
        self.column_sum = P.MatMul()
        self.row_sum = P.MatMul(transpose_a=True)

    def _inverse_rms(self, x_TD: Tensor) -> Tensor:
        mean_square = self.column_sum(ops.square(x_TD), self.ones_D) * self.inverse_width
        return ops.rsqrt(mean_square + self.eps)

    def construct(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        x32_TD = ops.cast(x_TD, self.dtype)
        normal_TD = x32_TD * self._inverse_rms(x32_TD)
        return ops.cast(normal_TD * ops.cast(weight, self.dtype), x_TD.dtype)

    def bprop(self, x_TD: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        x32_TD = ops.cast(x_TD, self.dtype)
        dout_TD = ops.cast(dout, self.dtype)
        inverse_rms = self._inverse_rms(x32_TD)
        normal_TD = x32_TD * inverse_rms
        ones_T = ops.ones((x_TD.shape[0], 1), self.dtype)
        dweight = ops.reshape(self.row_sum(dout_TD * normal_TD, ones_T), weight.shape)
        dnormal_TD = dout_TD * ops.cast(weight, self.dtype)
        along = self.column_sum(dnormal_TD * normal_TD, self.ones_D) * self.inverse_width
        dx_TD = (dnormal_TD - normal_TD * along) * inverse_rms
        return ops.cast(dx_TD, x_TD.dtype), ops.cast(dweight, weight.dtype)


class SwiGluOp(nn.Cell):
    """silu(gate) * up, element by element (Shazeer 2020). Both inputs and the output have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = P.Sigmoid()

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * self.sigmoid(gate) * up

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        # silu' = s + a - a s with s the sigmoid and a = gate * s; no scalar operand, which would be slower on CPU.
        sigmoid = self.sigmoid(gate)
        active = gate * sigmoid
        dgate = dout * up * (sigmoid + active - active * sigmoid)
        return dgate, dout * active


class RotaryOp(nn.Cell):
    """Rotate-half rotary embedding (Su et al. 2021; the layout of Hugging Face's LLaMA), no complex numbers.

    Inputs: ``x`` (B, S, H, P), ``cos`` and ``sin`` (1, S, 1, P) whose two halves are equal. Output: as ``x``.
    """

    def __init__(self, dtype: ms.Type = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.split = P.Split(axis=-1, output_num=2)
        self.concat = P.Concat(axis=-1)

    def _turn(self, x_BSHP: Tensor) -> Tensor:
        low, high = self.split(x_BSHP)
        return self.concat((-high, low))

    def construct(self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        x = ops.cast(x_BSHP, self.dtype)
        return ops.cast(x * cos_SP + self._turn(x) * sin_SP, x_BSHP.dtype)

    def bprop(
        self, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A rotation's transpose is the rotation back; the tables are constants.
        d = ops.cast(dout, self.dtype)
        dx_BSHP = ops.cast(d * cos_SP - self._turn(d) * sin_SP, x_BSHP.dtype)
        return dx_BSHP, ops.zeros_like(cos_SP), ops.zeros_like(sin_SP)
