# SPDX-License-Identifier: Apache-2.0
"""Next-token cross entropy over the tokens that count."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Tensor, nn, ops


class CrossEntropyRows(nn.Cell):
    """-log softmax(logits)[label] per row. Inputs: logits (T, V) float32, label (T) int32. Output (T, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_softmax = P.LogSoftmax(axis=-1)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        self.one_hot = P.OneHot()

    def construct(self, logits_TV: Tensor, label_T: Tensor) -> Tensor:
        return -ops.gather_elements(self.log_softmax(logits_TV), 1, ops.expand_dims(label_T, 1))

    def bprop(self, logits_TV: Tensor, label_T: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        target_TV = self.one_hot(label_T, logits_TV.shape[1], self.on, self.off)
        return (ops.softmax(logits_TV, -1) - target_TV) * dout, ops.zeros_like(label_T)


class NextTokenLoss(nn.Cell):
    """Mean cross entropy over counted tokens, in float32.

    Inputs: logits (T, V), label (T) int32, weight (T) float32 of 0 or 1. Output (). A row of weight 0 may carry any
    label; no counted token at all gives 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = CrossEntropyRows()

    def construct(self, logits_TV: Tensor, label_T: Tensor, weight_T: Tensor) -> Tensor:
        label_T = label_T * ops.cast(weight_T > 0, ms.int32)
        losses = self.rows(ops.cast(logits_TV, ms.float32), label_T)
        return (ops.reshape(losses, (-1,)) * weight_T).sum() / ops.maximum(weight_T.sum(), 1.0)
