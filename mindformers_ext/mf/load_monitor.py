# SPDX-License-Identifier: Apache-2.0
"""``MoEDropRateCallback``: ``jobs.train.hooks.LoadLog`` between MindFormers' steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindspore import Parameter, nn

from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StageLoad
from mindformers_ext.jobs.train.hooks import LoadLog, TrainHook, load_lines
from mindformers_ext.mf.hooks import HookCallback
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
from mindformers_ext.ms.kept_reports import KEPT


class MoELoadMonitor(HookCallback):
    """Shows per layer how evenly the experts are loaded and how many of their assignments are dropped.

    In place of MindFormers' ``MoEDropRateCallback``, which estimates the drop rate from parameters that are filled
    only while the "expert" loss is on. The figures are exact and those of the whole job: the train step adds up the
    load over all ranks and groups. In a pipeline each rank shows the layers of its stage, see ``StageLoads``.

    Args:
        per_print_times: show every n-th step.
        given: MindFormers' ``expert_num``, ``capacity_factor``, ``num_layers`` and ``mtp_depth``; they follow from the
            network here.
    """

    def __init__(self, per_print_times: int = 1, **given: Any) -> None:
        super().__init__()
        self.every = int(per_print_times)
        self.stage: StageLoads | None = None

    def make(self, model: nn.Cell) -> list[TrainHook]:
        """The hook, which calls the network's mixtures by their numbers among all layers; in a pipeline none, because
        a step's figures tell no load."""
        if not isinstance(model, PortableLlamaForCausalLM):
            return [LoadLog(logger.info, logger.warning, self.every)]
        if any(name.endswith(KEPT) for name in self.parameters):
            self.stage = StageLoads(model.spec, self.parameters, self.first)
            return []
        return [LoadLog(logger.info, logger.warning, self.every, model.spec.model.moe_layers)]

    def on_train_step_end(self, run_context: Any) -> None:
        """Show the step just done."""
        super().on_train_step_end(run_context)
        if self.stage is not None:
            number = run_context.original_args().cur_step_num
            self.stage.see(self.first + number, (number - 1) % self.every == 0)


class StageLoads:
    """In a pipeline: the load of this stage's mixtures, of the tokens that this rank routes.

    Ranks of a stage have other tokens each (those that share model parallel the same): their loads add up to the job's.
    """

    def __init__(self, spec: NetworkSpec, parameters: Mapping[str, Parameter], first: int) -> None:
        rank = get_real_rank()
        self.stage = rank * spec.parallel.pipeline_stage // spec.parallel.device_num
        self.layers = [layer for layer in spec.model.moe_layers if spec.layer_stage(layer) == self.stage]
        named = {f"model.layers.{layer}.{KEPT}" for layer in self.layers}
        self.held = [item for name, item in parameters.items() if name in named]
        self.before: list[np.ndarray] = [np.zeros(item.shape[-1], np.int32) for item in self.held]
        self.file = MetricsFile(get_output_root_path(), rank, first, "load_")

    def see(self, step: int, shows: bool) -> None:
        """``step`` is done: write its load, and log it if it ``shows``."""
        if not self.held:
            return
        # whole numbers of 32 bits wrap, and so does what they grew by
        sums = [item.asnumpy().sum(0, dtype=np.int32) for item in self.held]
        grown = np.stack([now - old for now, old in zip(sums, self.before, strict=True)])
        self.before = sums
        load, lost = grown[:, :-1].astype(float), grown[:, -1]
        dropped = lost / np.maximum(load.sum(1), 1.0)
        self.file.append(StageLoad(step, self.stage, self.layers, load.tolist(), dropped.tolist()))
        if shows:
            for line in load_lines(load, dropped, self.layers):
                logger.info("stage: %d, %s", self.stage, line)
