# SPDX-License-Identifier: Apache-2.0
"""The gate by threshold: a token passes every expert whose score W x + b is 0 or more, none or all of them, and each
adds what it computes as it is. No loss, and no gradient: what is chosen does not change smoothly."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.gate import GATES, Choice, RouterGate
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class BiasedGate(RouterGate):
    """x Wg^T + b, the sum in float32; bias (E) float32."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, router_dtype: ms.Type) -> None:
        experts, shards = moe.num_local_experts, Shards(spec)
        super().__init__(spec.model.hidden_size, experts, spec.model.initializer_range, router_dtype)
        self.bias = Parameter(initializer("zeros", (experts,), ms.float32), name="bias", parallel_optimizer=False)
        self.product, self.add = shards.shard(self.product, "gate"), shards.shard(P.BiasAdd(), "whole bias")

    def construct(self, x_TD: Tensor) -> Tensor:
        scores_TE = self.product(ops.cast(x_TD, self.dtype), ops.cast(self.weight, self.dtype))
        return self.add(ops.cast(scores_TE, ms.float32), self.bias)


class ThresholdChoice(nn.Cell):
    """E places a token: expert e in place e where it is chosen, else E, which is none."""

    def __init__(self, moe: MoESpec) -> None:
        super().__init__()
        self.experts = moe.num_local_experts
        self.number_E = Tensor(np.arange(self.experts, dtype=np.int32)[None, None])

    def construct(self, scores_GNE: Tensor) -> Choice:
        chosen_GNE = ops.cast(scores_GNE >= 0, ms.int32)
        weight_GNE = ops.stop_gradient(ops.cast(chosen_GNE, ms.float32))
        return self.number_E * chosen_GNE + self.experts * (1 - chosen_GNE), weight_GNE, weight_GNE


class ThresholdGate(nn.Cell):
    """``ms.moe.gate.Gate``."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        self.dense = BiasedGate(spec, moe, operators.router_dtype(moe.router_dtype))
        self.router = operators.build(ThresholdChoice, moe)
        self.no_bias = Tensor(np.zeros(moe.num_local_experts, np.float32))

    def scores(self, x_TD: Tensor) -> Tensor:
        """W x + b (T, E)."""
        return self.dense(x_TD)

    def bias(self) -> Tensor:
        """See ``Gate``: none that moves between steps."""
        return self.no_bias

    def choose(self, scores_GNS: Tensor, bias_E: Tensor) -> Choice:
        """See ``Gate``."""
        return self.router(scores_GNS)

    def loss(self, scores_GNS: Tensor, prob_GNE: Tensor, counts_GE: Tensor, counted_GN: Tensor | None = None) -> Tensor:
        """See ``Gate``: none."""
        return ops.zeros_like(counts_GE[:, 0])


GATES |= {"threshold": ThresholdGate}
