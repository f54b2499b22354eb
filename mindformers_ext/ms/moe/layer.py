# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: router, tokens to slots, experts, slots back to tokens.

Moving rows has gathers in both directions: the gradient of a gather by ``dispatch`` is a gather by ``combine`` and
the reverse, since each pairs the same tokens and slots. No scatter, so gradients are deterministic on every device.
"""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.experts import CapacityExperts
from mindformers_ext.ms.moe.router import TopkRouterV2
from mindformers_ext.ms.ops.portable import outer_product
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


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


class RouterGate(nn.Cell):
    """Router logits: x Wg^T in the router's type (float32 unless asked). Weight (E, D), no bias."""

    def __init__(self, hidden: int, experts: int, std: float, router_dtype: ms.Type) -> None:
        super().__init__()
        # small: kept whole on every device, as MindFormers does; cutting it would cost a gather more per layer
        self.weight = Parameter(
            initializer(Normal(sigma=std), (experts, hidden), ms.float32), name="weight", parallel_optimizer=False
        )
        self.dtype = router_dtype
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x_TD: Tensor) -> Tensor:
        return ops.cast(self.product(ops.cast(x_TD, self.dtype), ops.cast(self.weight, self.dtype)), ms.float32)


class Router(nn.Cell):
    """Gate and routing; its parts carry MindFormers' names ``router.dense`` and ``router.router``.

    Input (T, D). Outputs: dispatch (G, E, C), slot, kept and coeff (G, N, K), assignment (G, E, C), and per group the
    auxiliary loss (G) and a report (G, E + 1): assignments per expert before dropping, and the share dropped.
    """

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        model = spec.model
        router_dtype = operators.router_dtype(model.routing.router_dtype)
        experts = model.routing.num_local_experts
        self.dense = RouterGate(model.hidden_size, experts, model.initializer_range, router_dtype)
        if model.routing.balance_via_topk_bias:  # then every layer has its own bias
            self.router = TopkRouterV2(model.routing, spec.parallel, False, operators.slots)
        else:
            self.router = operators.build(TopkRouterV2, model.routing, spec.parallel, False, operators.slots)
        self.groups = spec.parallel.groups
        self.experts = experts
        shards = Shards(spec)
        self.dense.product = shards.shard(self.dense.product, "gate")
        self.is_local = shards.active
        self.local_slots = shards.region(self.slots, "slots", _SlotShapes(self.router), _slot_types)
        self.join = P.Concat(axis=-1)

    def slots(self, logits_GNE: Tensor, bias_E: Tensor) -> tuple:
        """What ``construct`` returns, from the logits (G, N, E) and the bias of the choice (E)."""
        dispatch_GEC, combine_GNK, coeff_GNK, assignment_GEC, aux_loss_G, counts_GE, dropped_G = self.router.route(
            logits_GNE, bias_E
        )
        capacity = dispatch_GEC.shape[2]
        expert_GNK = combine_GNK // (capacity + 1)
        kept_GNK = ops.cast(combine_GNK > expert_GNK * (capacity + 1), ms.float32)
        # Without the zero slot: expert * C + position; a dropped assignment reads slot 0 with weight 0.
        slot_GNK = (combine_GNK - expert_GNK - 1) * ops.cast(kept_GNK, ms.int32)
        report_GE = self.join((counts_GE, ops.expand_dims(dropped_G, 1)))
        return dispatch_GEC, slot_GNK, kept_GNK, coeff_GNK, assignment_GEC, aux_loss_G, report_GE

    def construct(self, x_TD: Tensor) -> tuple:
        logits_GNE = ops.reshape(self.dense(x_TD), (self.groups, -1, self.experts))
        if self.is_local:
            return self.local_slots(logits_GNE, self.router.bias())
        return self.slots(logits_GNE, self.router.bias())


def _dispatched_shape(x_GND: list, dispatch_GEC: list, slot: list, kept: list) -> list:
    """(G, E, C, D), for MindSpore's cut graph."""
    return [*dispatch_GEC, x_GND[2]]


def _combined_shape(y_GECD: list, coeff_GNK: list, slot: list, dispatch: list, assignment: list) -> list:
    """(G, N, D), for MindSpore's cut graph."""
    return [coeff_GNK[0], coeff_GNK[1], y_GECD[3]]


class _SlotShapes:
    """Whole shapes of what ``Router.slots`` returns, for MindSpore's cut graph."""

    def __init__(self, router: TopkRouterV2) -> None:
        self.router = router

    def __call__(self, logits: list, bias: list) -> tuple:
        G, N, E = logits
        router = self.router
        C = expert_capacity(router.chosen, N, router.moe.capacity_factor, E, router.multiple)
        by_slot, by_choice = [G, E, C], [G, N, router.chosen]
        return by_slot, by_choice, by_choice, by_choice, by_slot, [G], [G, E + 1]


def _slot_types(logits: ms.Type, bias: ms.Type) -> tuple:
    """Types of what ``Router.slots`` returns."""
    whole, real = ms.TensorType(ms.int32), ms.TensorType(ms.float32)
    return whole, whole, real, real, whole, real, real


class MoE(nn.Cell):
    """Mixture of SwiGLU experts. Input (T, D); outputs (T, D), and aux_loss (G) and report (G, E + 1) of ``Router``."""

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        model, chosen, shards = spec.model, spec.model.routing.num_experts_per_tok, Shards(spec)
        self.groups = spec.parallel.groups
        self.router = Router(spec, operators)
        self.ffn = CapacityExperts(spec, operators)
        self.dispatch = shards.local(operators.build(DispatchRows, chosen), "dispatch", _dispatched_shape)
        self.combine = shards.local(operators.build(CombineRows, chosen, model.hidden_size), "combine", _combined_shape)

    def construct(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dispatch_GEC, slot_GNK, kept_GNK, coeff_GNK, assignment_GEC, aux_loss_G, report_GE = self.router(x_TD)
        x_GND = ops.reshape(x_TD, (self.groups, -1, x_TD.shape[-1]))
        y_GECD = self.ffn(self.dispatch(x_GND, dispatch_GEC, slot_GNK, kept_GNK))
        out_GND = self.combine(y_GECD, coeff_GNK, slot_GNK, dispatch_GEC, assignment_GEC)
        return ops.reshape(out_GND, x_TD.shape), aux_loss_G, report_GE
