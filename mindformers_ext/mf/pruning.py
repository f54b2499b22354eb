# SPDX-License-Identifier: Apache-2.0
"""A network with masks (``ms.l0``) in MindFormers' loop: groups of the optimizer, multipliers that climb, and what
every step is given; as in our loop, to the same bits."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from mindformers_ext.jobs.train.hooks import TrainHook
from mindformers_ext.jobs.train.pruning_masks import PruningMasks
from mindformers_ext.mf.hooks import HookCallback


class ScaledRate(LearningRateSchedule):
    """``schedule`` times ``factor``; input and output as those of ``schedule``."""

    def __init__(self, schedule: LearningRateSchedule, factor: float) -> None:
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def construct(self, global_step: Tensor) -> Tensor:
        """The rate behind so many updates."""
        return self.schedule(global_step) * self.factor


class MaskInputs(HookCallback):
    """``PruningMasks`` between MindFormers' steps, for networks that have masks."""

    def __init__(self, seed: int, every: int = 0) -> None:
        """``seed``: the run's; ``every``: steps between settings of the masks of evaluation, 0 without evaluation."""
        super().__init__()
        self.seed, self.every = seed, every

    def make(self, model: Any) -> list[TrainHook]:
        """The hook, if the network has masks."""
        pruning = getattr(model, "pruning", None)
        return [PruningMasks(pruning, self.seed, self, self.every)] if pruning else []
