# SPDX-License-Identifier: Apache-2.0
"""The portable grouped product against numpy: groups of any number of rows, none too, and rows that no group has."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.ms.ops.portable import GroupedProductOp


class Gradients(nn.Cell):
    """Of rows and weights."""

    def __init__(self, product: nn.Cell) -> None:
        super().__init__()
        self.product = product
        self.grad = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x: Tensor, weight: Tensor, ends: Tensor, dout: Tensor) -> tuple:
        return self.grad(self.product)(x, weight, ends, dout)


def test_each_group_multiplies_its_own_rows(mode: str) -> None:
    rng = np.random.default_rng(0)
    x, weight, dout = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 6), (4, 5, 6), (9, 5)))
    product = GroupedProductOp(4)
    gradients = Gradients(product)
    for ends in ([2, 4, 7, 9], [0, 5, 5, 9], [0, 0, 0, 7], [3, 9, 9, 9]):
        given = Tensor(x), Tensor(weight), Tensor(np.array(ends, np.int64))
        want, dx, dweight = np.zeros_like(dout), np.zeros_like(x), np.zeros_like(weight)
        for group, (low, high) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            own = slice(low, high)
            want[own], dx[own] = x[own] @ weight[group].T, dout[own] @ weight[group]
            dweight[group] = dout[own].T @ x[own]
        found = product(*given), *gradients(*given, Tensor(dout))[:2]
        for ours, theirs in zip(found, (want, dx, dweight), strict=True):
            np.testing.assert_allclose(ours.asnumpy(), theirs, rtol=0, atol=1e-5)


def test_in_half_precision() -> None:
    rows, weight = (Tensor(np.ones(shape, np.float32), ms.float16) for shape in ((5, 4), (3, 2, 4)))
    found = GroupedProductOp(3)(rows, weight, Tensor(np.array([1, 1, 4], np.int64)))
    np.testing.assert_array_equal(found.astype(ms.float32).asnumpy(), [[4, 4]] * 4 + [[0, 0]])
