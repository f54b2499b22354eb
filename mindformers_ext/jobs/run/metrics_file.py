# SPDX-License-Identifier: Apache-2.0
"""What one training step has measured, and its file: one JSON object a step (``jobs.run.metrics`` reads it)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ext.core.figures import StepFigures
from mindformers_ext.core.plain_file import open_plain, refuse_other
from mindformers_ext.formats.atomic import write_text

FOLDER = "metrics"


@dataclass(frozen=True)
class StepRecord:
    """Figures of one step. ``expert_load`` (L, E) counts assignments before dropping; ``dropped`` (L) is their share.

    ``extra`` figures follow in the row under their own names; ``loss_scale`` is the scale the next step will use. Times
    are in seconds.
    """

    step: int
    epoch: int
    loss: float
    lm_loss: float
    aux_loss: float
    drop_rate: float
    learning_rate: float
    global_norm: float
    loss_scale: float
    overflow: bool
    seconds: float
    tokens_per_second: float
    dropped: list[float]
    expert_load: list[list[float]]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether both losses are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.lm_loss)

    @property
    def has_experts(self) -> bool:
        """Whether the step tells of experts."""
        return len(self.expert_load[0]) > 1

    def line(self) -> str:
        """The record as one line of JSON; values that are not finite are written as null."""
        row = {name: value for name, value in asdict(self).items() if name != "extra"} | self.extra
        row = {name: _finite(value) for name, value in row.items()}
        return json.dumps(row) + "\n"


def record_of(figures: StepFigures, step: int, per_epoch: int, seconds: float, tokens: int) -> StepRecord:
    """The record of step ``step`` (from 1), which took ``seconds`` for ``tokens`` of this process."""
    return StepRecord(
        step=step,
        epoch=(step - 1) // per_epoch + 1,
        loss=figures.loss,
        lm_loss=figures.lm_loss,
        aux_loss=figures.aux_loss,
        drop_rate=float(figures.dropped.mean()),
        learning_rate=figures.learning_rate,
        global_norm=figures.global_norm,
        loss_scale=figures.loss_scale,
        overflow=figures.overflow,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        dropped=[float(share) for share in figures.dropped],
        expert_load=figures.expert_load.astype(float).tolist(),
        extra=dict(figures.extra),
    )


@dataclass(frozen=True)
class StageLoad:
    """In a pipeline, what one step's mixtures of one stage had to do, by their numbers among all ``layers``."""

    step: int
    stage: int
    layers: list[int]
    expert_load: list[list[float]]
    dropped: list[float]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"


class MetricsFile:
    """Appends records to ``<output_dir>/metrics/rank_<rank>.jsonl``, or with ``kind`` before that name.

    A run from the start sets an older file aside as ``.previous``; a resumed run keeps the rows up to its first step,
    so that the file always reads as one uninterrupted run.
    """

    def __init__(self, output_dir: str, rank: int, first_step: int, kind: str = "") -> None:
        """``first_step``: the number of steps already done."""
        self.path = Path(output_dir) / FOLDER / f"{kind}rank_{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_other(self.path)
        if first_step == 0:
            if self.path.exists():
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
        elif self.path.exists():
            self._keep(first_step)

    def append(self, record: StepRecord | StageLoad) -> None:
        """Write one row; it is in the file when this returns."""
        with os.fdopen(open_plain(self.path), "a", encoding="utf-8") as file:
            file.write(record.line())

    def _keep(self, steps: int) -> None:
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the row a killed run was writing
            if json.loads(line)["step"] <= steps:
                rows.append(line)
        write_text(self.path, "".join(rows))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
