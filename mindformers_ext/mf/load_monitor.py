# SPDX-License-Identifier: Apache-2.0
"""``MoEDropRateCallback``: ``jobs.train.hooks.LoadLog`` between MindFormers' steps."""

from __future__ import annotations

from typing import Any

from mindformers.tools.logger import logger
from mindspore import nn

from mindformers_ext.jobs.train.hooks import LoadLog, TrainHook
from mindformers_ext.mf.hooks import HookCallback
from mindformers_ext.mf.networks import PortableLlamaForCausalLM


class MoELoadMonitor(HookCallback):
    """Shows per layer how evenly the experts are loaded and how many of their assignments are dropped.

    In place of MindFormers' ``MoEDropRateCallback``, which estimates the drop rate from parameters that are filled
    only while the "expert" loss is on. The figures are exact and those of the whole job: the train step adds up the
    load over all ranks and groups.

    Args:
        per_print_times: show every n-th step.
        given: MindFormers' ``expert_num``, ``capacity_factor``, ``num_layers`` and ``mtp_depth``; they follow from the
            network here.
    """

    def __init__(self, per_print_times: int = 1, **given: Any) -> None:
        super().__init__()
        self.every = int(per_print_times)

    def make(self, model: nn.Cell) -> list[TrainHook]:
        """The hook, which calls the network's mixtures by their numbers among all layers."""
        layers = model.spec.model.moe_layers if isinstance(model, PortableLlamaForCausalLM) else ()
        return [LoadLog(logger.info, logger.warning, self.every, layers)]
