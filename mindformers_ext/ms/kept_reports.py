# SPDX-License-Identifier: Apache-2.0
"""Reports of mixtures that stay on the devices of their pipeline stage, where no stage sees those of all layers."""

from __future__ import annotations

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.strategies import Shards

KEPT = "kept_report"  # the parameters' names end so


class CountedReport(nn.Cell):
    """A report (G, E + 1) of assignments per expert and their dropped share as whole numbers: the last becomes how many
    were dropped."""

    def construct(self, report_GE: Tensor) -> Tensor:
        counts_GE, share_G1 = report_GE[:, :-1], report_GE[:, -1:]
        dropped_G1 = share_G1 * ops.sum(counts_GE, 1, True)
        return ops.cast(ops.round(ops.cat((counts_GE, dropped_G1), 1)), ms.int32)


class KeptReport(nn.Cell):
    """Adds a layer's reports up, and hands its tokens x (T, D) on: what the sum grew by is the load of a step.

    A cell of the layer's stage, as ``ms.causal_lm.AddLosses``. Whole numbers of 32 bits are exact for ever: they wrap.
    """

    def __init__(self, spec: NetworkSpec, shards: Shards, layer: int, experts: int) -> None:
        super().__init__(auto_prefix=False)
        zeros = Tensor(np.zeros((spec.parallel.groups, experts + 1)), ms.int32)
        self.name = f"model.layers.{layer}.{KEPT}"
        self.held = Parameter(zeros, self.name, requires_grad=False, parallel_optimizer=False)
        self.counted = shards.local(CountedReport(), "kept report", _same_shape, _whole_numbers)
        self.add = shards.shard(P.AssignAdd(), "kept reports")

    def construct(self, x_TD: Tensor, report_GE: Tensor) -> Tensor:
        return ops.depend(x_TD, self.add(self.held, self.counted(report_GE)))


class PassedReport(nn.Cell):
    """In the place of ``KeptReport`` at a dense layer."""

    def construct(self, x_TD: Tensor, report_GE: None) -> Tensor:
        return x_TD


def name_reports(cells: nn.CellList) -> None:
    """Give parameters their own names again: whoever took the cells has put another before them."""
    for cell in cells:
        if isinstance(cell, KeptReport):
            cell.held.name = cell.name


def kept_reports(spec: NetworkSpec) -> nn.CellList:
    """A cell for every layer."""
    shards, model = Shards(spec), spec.model
    cells: list[nn.Cell] = []
    for index in range(model.num_hidden_layers):
        moe = model.layer(index).moe
        kept = KeptReport(spec, shards, index, moe.num_local_experts) if moe else PassedReport()
        cells.append(shards.stage(kept, spec.layer_stage(index)))
    return nn.CellList(cells)


def _same_shape(report: list) -> list:
    return list(report)


def _whole_numbers(report: ms.Type) -> ms.Type:
    return ms.TensorType(ms.int32)
