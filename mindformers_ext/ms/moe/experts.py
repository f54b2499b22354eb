# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts: w2(silu(w1 x) * w3 x) of every slot (Mixtral of Experts, section 2.1).

``SlotExperts`` multiplies equal numbers of slots in one batched product over all experts; ``SortedExperts`` unequal
ones in one grouped product (MegaBlocks, Gale et al. 2022, section 4). Their parameters are the same.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.exchange import ExchangedProducts, collectives_along
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class ExpertLinear(nn.Cell):
    """One matrix per expert. Input (E, C, in), output (E, C, out), weight (E, out, in), where asked bias (E, out)."""

    def __init__(
        self,
        experts: int,
        width_in: int,
        width_out: int,
        std: float,
        param_dtype: ms.Type,
        shards: Shards,
        row: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape = (experts, width_out, width_in)
        self.weight = Parameter(initializer(Normal(sigma=std), shape, param_dtype), name="weight")
        self.product = shards.shard(P.BatchMatMul(transpose_b=True), row)
        self.has_bias = bias
        if bias:
            self.bias = Parameter(initializer("zeros", (experts, width_out), param_dtype), name="bias")
            self.expand = shards.shard(P.ExpandDims(), "expert biases")
            self.add = shards.shard(P.Add(), "expert bias")

    def construct(self, x_ECD: Tensor) -> Tensor:
        y_ECD = self.product(x_ECD, ops.cast(self.weight, x_ECD.dtype))
        if self.has_bias:
            return self.add(y_ECD, self.expand(ops.cast(self.bias, y_ECD.dtype), 1))
        return y_ECD


class Experts(nn.Cell):
    """The weights w1, w3 (E, M, D) and w2 (E, D, M), M the width of an expert; where they have biases, w2's (E, D)."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        model, shards = spec.model, Shards(spec)
        experts, hidden, width = moe.num_local_experts, model.hidden_size, moe.intermediate_size or model.expert_size
        std, param_dtype = model.initializer_range, mindspore_dtype(spec.numerics.param_dtype)
        self.w1 = ExpertLinear(experts, hidden, width, std, param_dtype, shards, "expert in")
        self.w2 = ExpertLinear(experts, width, hidden, std, param_dtype, shards, "expert out", moe.expert_bias)
        self.w3 = ExpertLinear(experts, hidden, width, std, param_dtype, shards, "expert in")
        self.swiglu = shards.local(operators.build(operators.swiglu), "expert")


class SlotExperts(Experts):
    """Input and output (G, E, C, D); the counts are not looked at."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__(spec, moe, operators)
        shards = Shards(spec)
        self.transpose = P.Transpose()
        self.exchanges = shards.active
        self.box = (shards.outer, shards.ep, spec.parallel.groups // shards.dp)
        self.to_experts = shards.shard(P.Transpose(), "to experts")
        self.from_experts = shards.shard(P.Transpose(), "from experts")

    def _exchanged(self, x_GECD: Tensor) -> Tensor:
        """The same on many devices: G = (outer, ep, mp) groups, each on its device, and experts split over ep.

        The first transposition trades groups for experts over ep (AllToAll), the second trades them back. Rows are
        ordered (outer, mp, ep, C), so that each device of mp takes its groups' rows of the sums over mp of ``w2``.
        """
        outer, ep, mp = self.box
        _, E, C, D = x_GECD.shape
        x = self.to_experts(ops.reshape(x_GECD, (outer, ep, mp, E, C, D)), (3, 0, 2, 1, 4, 5))
        x_ECD = ops.reshape(x, (E, -1, D))
        y_ECD = self.w2(self.swiglu(self.w1(x_ECD), self.w3(x_ECD)))
        y = self.from_experts(ops.reshape(y_ECD, (E, outer, mp, ep, C, D)), (1, 3, 2, 0, 4, 5))
        return ops.reshape(y, x_GECD.shape)

    def construct(self, x_GECD: Tensor, counts_GE: Tensor) -> Tensor:
        if self.exchanges:
            return self._exchanged(x_GECD)
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


class SortedExperts(Experts):
    """Input and output: rows (G, 1, T, D) sorted by expert; the counts (G, E) float32 say how many each has.

    On several devices of a cut graph they are ``ms.moe.exchange``'s.

    Raises:
        ValueError: several routing groups on one device.
    """

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__(spec, moe, operators)
        shards, groups = Shards(spec), spec.parallel.groups
        if groups > 1 and not shards.active:
            raise ValueError(f"grouped experts sort the tokens of one device: one routing group, not {groups}")
        cell: nn.Cell = GroupedProducts(operators, moe.num_local_experts // shards.ep)
        if shards.ep * shards.mp > 1:
            width, own_rows = spec.model.hidden_size, spec.parallel.use_seq_parallel
            experts, columns = (collectives_along(shards, axis, width) for axis in ("ep", "mp"))
            cell = ExchangedProducts(cell, width, experts, columns, own_rows)
        self.grouped = shards.local(cell, "grouped biased experts" if moe.expert_bias else "grouped experts")

    def construct(self, x_GETD: Tensor, counts_GE: Tensor) -> Tensor:
        kind = x_GETD.dtype  # cast here: what the optimizer's cut keeps in parts is gathered in the type that computes
        w1, w3, w2 = ops.cast(self.w1.weight, kind), ops.cast(self.w3.weight, kind), ops.cast(self.w2.weight, kind)
        if self.w2.has_bias:
            return self.grouped(x_GETD, counts_GE, w1, w3, w2, ops.cast(self.w2.bias, kind))
        return self.grouped(x_GETD, counts_GE, w1, w3, w2)


class GroupedProducts(nn.Cell):
    """Each row by the weights of its expert. Inputs: rows (1, 1, T, D), counts (1, E), w1, w3 and w2, and w2's biases
    (E, D) where it has any, all of the rows' type."""

    def __init__(self, operators: Operators, experts: int) -> None:
        super().__init__()
        self.product = operators.build(operators.grouped_product, experts)
        self.swiglu = operators.build(operators.swiglu)
        self.sum_up, self.gather, self.last = P.CumSum(), P.Gather(), experts - 1

    def construct(
        self, x_GETD: Tensor, counts_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        x_TD = ops.reshape(x_GETD, (-1, x_GETD.shape[3]))
        count_E = ops.cast(ops.reshape(counts_GE, (-1,)), ms.int32)
        return ops.reshape(self.of_rows(x_TD, count_E, w1, w3, w2, bias), x_GETD.shape)

    def of_rows(
        self, x_TD: Tensor, count_E: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The same of rows (T, D) and int32 counts (E)."""
        end_E = ops.cast(self.sum_up(count_E, 0), ms.int64)
        gate, up = self.product(x_TD, w1, end_E), self.product(x_TD, w3, end_E)
        y_TD = self.product(self.swiglu(gate, up), w2, end_E)
        if bias is not None:
            place_T1 = ops.expand_dims(ops.arange(x_TD.shape[0], dtype=ms.int64), 1)
            behind_T = ops.cast(place_T1 >= ops.expand_dims(end_E, 0), ms.int32).sum(1)
            y_TD = y_TD + self.gather(bias, ops.minimum(behind_T, self.last), 0)
        return y_TD
