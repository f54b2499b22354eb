# SPDX-License-Identifier: Apache-2.0
"""The learning rate of ``core.config.schedule`` inside a train step's graph, in float32."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from mindformers_ext.core.config.schedule import Schedule


class ScheduledRate(LearningRateSchedule):
    """``schedule.rate(step)`` times ``factor`` as a cell; input: updates done (1) int32, output: the rate (1).

    The operators and their order are those of MindFormers' schedules, so that both round alike.
    """

    def __init__(self, schedule: Schedule, factor: float = 1.0) -> None:
        super().__init__()
        self.kind = schedule.kind
        self.top, self.start, self.factor = schedule.learning_rate, schedule.warmup_lr_init, factor
        self.has_warmup = schedule.warmup_steps > 0
        falling = max(1, schedule.total_steps - schedule.warmup_steps)
        self.end, self.warmup, self.falling, self.total, self.decay, self.zero, self.one = (
            Tensor(value, ms.float32)
            for value in (
                schedule.lr_end,
                schedule.warmup_steps,
                falling,
                schedule.total_steps,
                schedule.decay_steps,
                0.0,
                1.0,
            )
        )
        self.turn = math.pi * schedule.num_cycles * 2.0

    def construct(self, global_step: Tensor) -> Tensor:
        step = ops.cast(global_step, ms.float32)
        rate = self.after_warmup(step)
        if self.has_warmup:
            rising = self.start + (self.top - self.start) * (step / self.warmup)
            rate = ops.select(self.warmup > step, rising, rate)
        if self.kind == "CosineWithWarmUpLR":
            rate = ops.select(step >= self.decay, step - step + self.end, rate)
        if self.factor != 1.0:
            rate = rate * self.factor
        return rate

    def after_warmup(self, step: Tensor) -> Tensor:
        """The rate (1) once it no longer rises."""
        if self.kind == "CosineWithWarmUpLR":
            progress = (step - self.warmup) / self.falling
            share = ops.maximum(self.zero, 0.5 * (1.0 + ops.cos(self.turn * progress)))
            return self.end + (self.top - self.end) * share
        if self.kind == "LinearWithWarmUpLR":
            return self.top * ops.maximum(self.zero, (self.total - step) / self.falling)
        return step - step + self.top * self.one
