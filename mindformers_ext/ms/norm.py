# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with its weight."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class RmsNorm(nn.Cell):
    """Root-mean-square normalisation (Zhang and Sennrich 2019). Input and output (T, D)."""

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        width, dtype = spec.model.hidden_size, mindspore_dtype(spec.numerics.param_dtype)
        self.weight = Parameter(initializer("ones", (width,), dtype), name="weight")
        self.norm_dtype = operators.dtype(spec.numerics.norm_dtype)
        norm = operators.build(operators.rms_norm, width, spec.model.rms_norm_eps, self.norm_dtype)
        self.norm = Shards(spec).local(norm, "norm")

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.norm(x_TD, self.weight)


class HeadNorm(nn.Cell):
    """The same over every head's width. Input and output (B, S, H, P), weight (P), one for all heads."""

    def __init__(self, spec: NetworkSpec, head_dim: int, operators: Operators) -> None:
        super().__init__()
        dtype = mindspore_dtype(spec.numerics.param_dtype)
        self.weight = Parameter(initializer("ones", (head_dim,), dtype), name="weight")
        norm = operators.build(
            operators.rms_norm, head_dim, spec.model.rms_norm_eps, operators.dtype(spec.numerics.norm_dtype)
        )
        self.norm = Shards(spec).local(operators.build(HeadRows, norm), "head norm")

    def construct(self, x_BSHP: Tensor) -> Tensor:
        return self.norm(x_BSHP, self.weight)


class HeadRows(nn.Cell):
    """A norm of rows (T, P) on heads (B, S, H, P)."""

    def __init__(self, norm: nn.Cell) -> None:
        super().__init__()
        self.norm = norm

    def construct(self, x_BSHP: Tensor, weight: Tensor) -> Tensor:
        return ops.reshape(self.norm(ops.reshape(x_BSHP, (-1, x_BSHP.shape[3])), weight), x_BSHP.shape)
