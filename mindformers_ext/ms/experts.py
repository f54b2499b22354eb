# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts on slots: one batched matrix product over all experts."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.ms.ops.select import Operators


class ExpertLinear(nn.Cell):
    """One matrix per expert, no bias. Input (E, C, in), output (E, C, out), weight (E, out, in)."""

    def __init__(self, experts: int, width_in: int, width_out: int, std: float, param_dtype: ms.Type) -> None:
        super().__init__()
        shape = (experts, width_out, width_in)
        self.weight = Parameter(initializer(Normal(sigma=std), shape, param_dtype), name="weight")
        self.product = P.BatchMatMul(transpose_b=True)

    def construct(self, x_ECD: Tensor) -> Tensor:
        return self.product(x_ECD, ops.cast(self.weight, x_ECD.dtype))


class CapacityExperts(nn.Cell):
    """w2(silu(w1 x) * w3 x) for every slot (Mixtral of Experts, section 2.1). Input and output (G, E, C, D)."""

    def __init__(
        self, operators: Operators, experts: int, hidden: int, ffn: int, std: float, param_dtype: ms.Type
    ) -> None:
        super().__init__()
        self.w1 = ExpertLinear(experts, hidden, ffn, std, param_dtype)
        self.w2 = ExpertLinear(experts, ffn, hidden, std, param_dtype)
        self.w3 = ExpertLinear(experts, hidden, ffn, std, param_dtype)
        self.swiglu = operators.build(operators.swiglu)
        self.transpose = P.Transpose()

    def construct(self, x_GECD: Tensor) -> Tensor:
        G, E, C, D = x_GECD.shape
        x_ECD = ops.reshape(x_GECD, (E, -1, D)) if G == 1 else self._by_expert(x_GECD)
        y_ECD = self.w2(self.swiglu(self.w1(x_ECD), self.w3(x_ECD)))
        if G == 1:
            return ops.reshape(y_ECD, (1, E, -1, D))
        return self.transpose(ops.reshape(y_ECD, (E, G, -1, D)), (1, 0, 2, 3))

    def _by_expert(self, x_GECD: Tensor) -> Tensor:
        """(G, E, C, D) -> (E, G*C, D)."""
        x_EGCD = self.transpose(x_GECD, (1, 0, 2, 3))
        return ops.reshape(x_EGCD, (x_EGCD.shape[0], -1, x_EGCD.shape[3]))
