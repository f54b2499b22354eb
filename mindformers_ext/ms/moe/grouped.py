# SPDX-License-Identifier: Apache-2.0
"""The MoE layer without slots: tokens sorted by expert, one grouped matrix product, no token dropped.

MegaBlocks (Gale et al. 2022, section 4) computes experts of unequal load this way. A slot is then a place among the
sorted assignments, so rows move by the cells of ``ms.moe.layer`` and checkpoints are those of experts with slots.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.moe.layer import MoE
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class GroupedExperts(nn.Cell):
    """w2(silu(w1 x) * w3 x), each row by the weights of its expert.

    Inputs: rows (1, 1, kN, D) sorted by expert, ends of the experts' parts (1, E) int32, and the weights w1, w3
    (E, F, D) and w2 (E, D, F). Output as the rows.
    """

    def __init__(self, operators: Operators, experts: int) -> None:
        super().__init__()
        self.product = operators.build(operators.grouped_product, experts)
        self.swiglu = operators.build(operators.swiglu)

    def construct(self, x_GETD: Tensor, end_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        kind = x_GETD.dtype
        x_TD = ops.reshape(x_GETD, (-1, x_GETD.shape[3]))
        end_E = ops.cast(ops.reshape(end_GE, (-1,)), ms.int64)
        gate, up = self.product(x_TD, ops.cast(w1, kind), end_E), self.product(x_TD, ops.cast(w3, kind), end_E)
        y_TD = self.product(self.swiglu(gate, up), ops.cast(w2, kind), end_E)
        return ops.reshape(y_TD, x_GETD.shape)


class GroupedMoE(MoE):
    """As ``MoE``, with the same parameters; ``moe_config.use_gmm`` chooses it."""

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__(spec, operators)
        experts, shards = spec.model.routing.num_local_experts, Shards(spec)
        self.experts, self.chosen = experts, spec.model.routing.num_experts_per_tok
        if self.groups > 1 and not shards.active:
            raise ValueError(f"grouped experts sort the tokens of one device: one routing group, not {self.groups}")
        self.is_cut = shards.active
        self.cut_rows = shards.region(self.rows, "sorted rows", self._row_shapes, _row_types)
        self.grouped = shards.local(GroupedExperts(operators, experts), "grouped experts")

    def rows(self, logits_GNE: Tensor, bias_E: Tensor) -> tuple:
        """What moves rows: dispatch (G, 1, kN), place and ones (G, N, K), gates, assignment (G, 1, kN); where experts
        end (G, E); aux_loss (G) and report (G, E + 1) of ``Router``."""
        gate_GNK, sorted_GT, place_GNK, end_GE, aux_loss_G, load_GE = self.router.router.sorted_rows(logits_GNE, bias_E)
        assignment_GET = ops.expand_dims(sorted_GT, 1)
        dispatch_GET = assignment_GET // self.chosen + 1
        report_GE = self.router.join((load_GE, ops.zeros_like(load_GE[:, :1])))
        return (
            dispatch_GET,
            place_GNK,
            ops.ones_like(gate_GNK),
            gate_GNK,
            assignment_GET,
            end_GE,
            aux_loss_G,
            report_GE,
        )

    def _row_shapes(self, logits: list, bias: list) -> tuple:
        G, N, E = logits
        by_row, by_choice = [G, 1, N * self.chosen], [G, N, self.chosen]
        return by_row, by_choice, by_choice, by_choice, by_row, [G, E], [G], [G, E + 1]

    def construct(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_GNE = ops.reshape(self.router.dense(x_TD), (self.groups, -1, self.experts))
        bias_E = self.router.router.bias()
        if self.is_cut:
            found = self.cut_rows(logits_GNE, bias_E)
        else:
            found = self.rows(logits_GNE, bias_E)
        dispatch_GET, place_GNK, ones_GNK, gate_GNK, assignment_GET, end_GE, aux_loss_G, report_GE = found
        x_GND = ops.reshape(x_TD, (self.groups, -1, x_TD.shape[-1]))
        x_GETD = self.dispatch(x_GND, dispatch_GET, place_GNK, ones_GNK)
        y_GETD = self.grouped(x_GETD, end_GE, self.ffn.w1.weight, self.ffn.w3.weight, self.ffn.w2.weight)
        out_GND = self.combine(y_GETD, gate_GNK, place_GNK, dispatch_GET, assignment_GET)
        return ops.reshape(out_GND, x_TD.shape), aux_loss_G, report_GE


def _row_types(logits: ms.Type, bias: ms.Type) -> tuple:
    """Types of what ``GroupedMoE.rows`` returns."""
    whole, real = ms.TensorType(ms.int32), ms.TensorType(ms.float32)
    return whole, whole, real, real, whole, whole, real, real
