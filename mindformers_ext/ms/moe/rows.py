# SPDX-License-Identifier: Apache-2.0
"""Rows from tokens to slots and back.

Moving rows has gathers in both directions: the gradient of a gather by ``dispatch`` is a gather by ``slot`` and the
reverse, since each pairs the same tokens and slots. No scatter, so gradients are deterministic on every device.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.ms.ops.portable import outer_product


def scaled_rows(rows: Tensor, factor: Tensor, outer: P.Primitive) -> Tensor:
    """Rows (..., D) times one factor each (...), spread by ``outer_product``."""
    ones_D = ops.ones((1, rows.shape[-1]), rows.dtype)
    return rows * ops.reshape(outer(ops.reshape(factor, (-1, 1)), ones_D), rows.shape)


class WeightedRows(nn.Cell):
    """Sum over K of a weight times a gathered row.

    Inputs: rows (G, R, D), index (G, N, K) int32 into R, weight (G, N, K). Output (G, N, D). One gather per choice:
    a gather of (G, N, K, D) would need a slow sum over K.
    """

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.choices = range(1, chosen)
        self.split = P.Split(axis=2, output_num=chosen)
        self.gather = P.Gather(batch_dims=1)
        self.outer = outer_product()

    def construct(self, rows_GTD: Tensor, index_GNK: Tensor, weight_GNK: Tensor) -> Tensor:
        index = self.split(index_GNK)
        weight = self.split(ops.cast(weight_GNK, rows_GTD.dtype))
        total = self._weighted(rows_GTD, index[0], weight[0])
        for j in self.choices:
            total = total + self._weighted(rows_GTD, index[j], weight[j])
        return ops.squeeze(total, 2)

    def _weighted(self, rows_GTD: Tensor, index_GNK: Tensor, weight_GNK: Tensor) -> Tensor:
        return scaled_rows(self.gather(rows_GTD, index_GNK, 1), weight_GNK, self.outer)


class DispatchRows(nn.Cell):
    """Copies token rows into slots.

    Inputs: x (G, N, D), dispatch (G, E, C), and for the gradient slot (G, N, K) int32 (a flat E*C index) and kept
    (G, N, K) of 0 or 1. Output (G, E, C, D). An empty slot holds the first token's row; nothing reads its result.
    """

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.gather = P.Gather(batch_dims=1)
        self.weighted_rows = WeightedRows(chosen)

    def construct(self, x_GND: Tensor, dispatch_GEC: Tensor, slot_GNK: Tensor, kept_GNK: Tensor) -> Tensor:
        return self.gather(x_GND, ops.maximum(dispatch_GEC - 1, 0), 1)

    def bprop(
        self, x_GND: Tensor, dispatch_GEC: Tensor, slot_GNK: Tensor, kept_GNK: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = ops.reshape(dout, (dout.shape[0], -1, dout.shape[-1]))
        dx_GND = self.weighted_rows(rows, slot_GNK, kept_GNK)
        return dx_GND, ops.zeros_like(dispatch_GEC), ops.zeros_like(slot_GNK), ops.zeros_like(kept_GNK)


class CombineRows(nn.Cell):
    """Weighted sum of each token's slots.

    Inputs: y (G, E, C, D), coeff (G, N, K) (0 where dropped), slot (G, N, K) flat E*C index, and for the gradient
    dispatch and assignment (G, E, C). Output (G, N, D).
    """

    def __init__(self, chosen: int, width: int) -> None:
        super().__init__()
        self.choices = range(1, chosen)
        self.split = P.Split(axis=2, output_num=chosen)
        self.gather = P.Gather(batch_dims=1)
        self.weighted_rows, self.outer = WeightedRows(chosen), outer_product()
        self.ones_D = Tensor(np.ones((width, 1), np.float32))
        self.row_sum = P.MatMul()
        self.concat = P.Concat(axis=-1)

    def construct(
        self, y_GECD: Tensor, coeff_GNK: Tensor, slot_GNK: Tensor, dispatch_GEC: Tensor, assignment_GEC: Tensor
    ) -> Tensor:
        rows = ops.reshape(y_GECD, (y_GECD.shape[0], -1, y_GECD.shape[-1]))
        return self.weighted_rows(rows, slot_GNK, coeff_GNK)

    def _along(self, rows_GTD: Tensor, index_GNK: Tensor, dout_GND: Tensor) -> Tensor:
        """Dot products (G, N, 1) of one choice's rows with the output's gradient (G, N, 1, D)."""
        product = ops.cast(self.gather(rows_GTD, index_GNK, 1) * dout_GND, ms.float32)
        along = self.row_sum(ops.reshape(product, (-1, product.shape[3])), self.ones_D)
        return ops.reshape(along, index_GNK.shape)

    def bprop(
        self,
        y_GECD: Tensor,
        coeff_GNK: Tensor,
        slot_GNK: Tensor,
        dispatch_GEC: Tensor,
        assignment_GEC: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        G, _, D = dout.shape
        filled_GEC = ops.cast(dispatch_GEC > 0, coeff_GNK.dtype)
        weight_GEC = self.gather(ops.reshape(coeff_GNK, (G, -1)), assignment_GEC, 1) * filled_GEC
        dy_GECD = self.gather(dout, ops.maximum(dispatch_GEC - 1, 0), 1)
        dy_GECD = scaled_rows(dy_GECD, ops.cast(weight_GEC, dout.dtype), self.outer)
        rows = ops.reshape(y_GECD, (G, -1, D))
        index, dout_GND = self.split(slot_GNK), ops.expand_dims(dout, 2)
        parts: tuple = (self._along(rows, index[0], dout_GND),)
        for j in self.choices:
            parts = parts + (self._along(rows, index[j], dout_GND),)
        dcoeff_GNK = ops.cast(self.concat(parts), coeff_GNK.dtype)
        return (
            dy_GECD,
            dcoeff_GNK,
            ops.zeros_like(slot_GNK),
            ops.zeros_like(dispatch_GEC),
            ops.zeros_like(assignment_GEC),
        )
