# SPDX-License-Identifier: Apache-2.0
"""Cells that the measurements wrap around ours (MindSpore compiles only what a file defines)."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops


class ForwardBackward(nn.Cell):
    """Gradients of a layer's first output with respect to its input and weights."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.weights = ms.ParameterTuple(layer.trainable_params())
        self.gradients = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def first(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]

    def construct(self, x: Tensor, dout: Tensor) -> tuple:
        return self.gradients(self.first, self.weights)(x, dout)


class WithNoise(nn.Cell):
    """A mixture that is given its gate's noise; its loss is added to the output, so that it is differentiated too."""

    def __init__(self, layer: nn.Cell, noise: Tensor) -> None:
        super().__init__(auto_prefix=False)
        self.layer, self.noise = layer, noise

    def construct(self, x: Tensor) -> tuple:
        out, loss, told = self.layer(x, self.noise)
        return out + loss.sum(), told
