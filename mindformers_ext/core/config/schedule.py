# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules of MindFormers' YAMLs as a function of the number of updates done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.errors import Problems

KINDS = ("CosineWithWarmUpLR", "LinearWithWarmUpLR", "ConstantWarmUpLR")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``rate(step)``: from ``warmup_lr_init`` in a straight line to ``learning_rate``, then as ``kind`` says."""

    kind: str
    learning_rate: float
    warmup_steps: int = 0
    total_steps: int = 1
    lr_end: float = 0.0
    warmup_lr_init: float = 0.0
    num_cycles: float = 0.5
    decay_steps: int = 1

    def rate(self, step: int) -> float:
        """The learning rate of the update after ``step`` updates."""
        cosine = self.kind == "CosineWithWarmUpLR"
        if cosine and step >= self.decay_steps:
            return self.lr_end
        if step < self.warmup_steps:
            return self.warmup_lr_init + (self.learning_rate - self.warmup_lr_init) * step / self.warmup_steps
        falling = max(1, self.total_steps - self.warmup_steps)
        if cosine:
            turn = math.cos(math.pi * self.num_cycles * 2.0 * (step - self.warmup_steps) / falling)
            return self.lr_end + (self.learning_rate - self.lr_end) * max(0.0, 0.5 * (1.0 + turn))
        if self.kind == "LinearWithWarmUpLR":
            return self.learning_rate * max(0.0, (self.total_steps - step) / falling)
        return self.learning_rate


def schedule_from_yaml(config: Mapping[str, Any], steps: int, per_epoch: int, problems: Problems) -> Schedule:
    """The schedule of ``lr_schedule``, or the constant ``optimizer.learning_rate`` where there is none.

    Args:
        config: the YAML's content.
        steps: steps of the whole run, for ``total_steps`` null or -1.
        per_epoch: steps of one pass over the data, for ``warmup_epochs``.
        problems: takes what is wrong.
    """
    words = config.get("lr_schedule")
    if not words:
        rate = (config.get("optimizer") or {}).get("learning_rate")
        if not isinstance(rate, (int, float)):
            problems.add(f"no lr_schedule, and optimizer.learning_rate={rate!r}", "give one of them")
            rate = 0.0
        return Schedule(kind="ConstantWarmUpLR", learning_rate=float(rate))
    kind = words.get("type")
    problems.one_of("lr_schedule.type", kind, KINDS)
    given = {name: words.get(name) for name in ("learning_rate", "lr_end", "warmup_lr_init", "num_cycles")}
    for name, value in given.items():
        if value is None and name == "learning_rate" or value is not None and not _is_number(value):
            problems.add(f"lr_schedule.{name}={value!r} is no number", "give one")
    total = words.get("total_steps")
    total = steps if total in (None, -1) else int(total)
    warmup = _phase(words, "warmup", total, problems) or 0
    if words.get("warmup_epochs") and words.get("warmup_ratio") is None:
        warmup = int(words["warmup_epochs"] * per_epoch)
    decay = _phase(words, "decay", total, problems)
    numbers = {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
    return Schedule(
        kind=str(kind),
        **{"learning_rate": 0.0, **numbers},
        warmup_steps=warmup,
        total_steps=total,
        decay_steps=max(1, total if decay is None else decay),
    )


def _phase(words: Mapping[str, Any], name: str, total: int, problems: Problems) -> int | None:
    """Steps of a phase; a ratio of all steps goes before a number of steps."""
    ratio, steps = words.get(f"{name}_ratio"), words.get(f"{name}_steps")
    if ratio is not None:
        if not _is_number(ratio) or not 0.0 <= ratio <= 1.0:
            problems.add(f"lr_schedule.{name}_ratio={ratio!r} is out of range", "give a number from 0 to 1")
            return None
        return int(total * ratio)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        problems.add(f"lr_schedule.{name}_steps={steps!r}", "give a whole number, 0 or more")
        return None
    return steps


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
