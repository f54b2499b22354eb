# SPDX-License-Identifier: Apache-2.0
"""What a training loop says about each step, and when it gives up; MindFormers' loop and our own watch alike."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.saved import set_aside
from mindformers_ext.jobs.run.display import current
from mindformers_ext.jobs.run.keep import last_good
from mindformers_ext.jobs.run.metrics_file import StepRecord

PATIENCE = 50  # steps in a row whose gradients overflow before the run gives up
SHORT_PATIENCE = 5  # the same while the loss scale stands still: then no later step can differ
LAST, EXPLODED = 5, 1.5  # the median LM loss of the last steps, above so many times the first one, is no learning
RECENT = 20  # steps whose median time tells what remains
LINE = (
    "{ Epoch:[%3d/%3d], step:[%5d/%5d], loss: %.6f, lm_loss: %.6f, aux_loss: %.6f, drop_rate: %.2f%%, "
    "per_step_time: %dms, lr: %.4e, overflow cond: %s, loss_scale: %s, global_norm: %.4f, tokens/s: %d, "
    "remaining: %s }"
)


class Watch:
    """Looks at every step of a run, in order.

    Args:
        log: takes a format and its values, as ``logger.info`` does.
        folder: this rank's checkpoints, None where none are written.
        per_epoch: steps of one pass over the data.
        steps: steps of the whole run.
        first: steps done before this process started.
        every: log every n-th step.
        suffix: kind of the checkpoints.
    """

    def __init__(
        self,
        log: Callable[..., None],
        folder: Path | None,
        per_epoch: int,
        steps: int,
        first: int = 0,
        every: int = 1,
        suffix: str = ".ckpt",
    ) -> None:
        self.log, self.folder, self.suffix = log, folder, suffix
        self.per_epoch, self.steps, self.first, self.every = per_epoch, steps, first, every
        self.began = time.time()
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.losses: deque[float] = deque(maxlen=LAST)
        self.first_loss: float | None = None  # of this process
        self.overflowed: list[float] = []  # loss scale of each step of the present streak

    def see(self, record: StepRecord) -> None:
        """Show the step, and log it when it is its turn.

        Raises:
            UserError: the loss is not a number, or gradients overflow 50 steps in a row (5 while the loss scale is
                fixed or at its floor).
        """
        done = record.step - self.first
        if done > 1:  # the first step compiles
            self.recent.append(record.seconds)
        left = (self.steps - record.step) * (statistics.median(self.recent) if self.recent else record.seconds)
        if (done - 1) % self.every == 0 or not record.is_finite:
            self._log(record, left)
        current().step(record, self.steps, left if self.recent else None)
        self._judge(record)
        self.losses.append(record.lm_loss)
        self.first_loss = record.lm_loss if self.first_loss is None else self.first_loss
        if record.step == self.steps and done > 1:
            self._judge_end(self.first_loss)

    def _log(self, record: StepRecord, left: float) -> None:
        self.log(
            LINE,
            record.epoch,
            -(-self.steps // self.per_epoch),
            (record.step - 1) % self.per_epoch + 1,
            self.per_epoch,
            record.loss,
            record.lm_loss,
            record.aux_loss,
            100 * record.drop_rate,
            int(1000 * record.seconds),
            record.learning_rate,
            record.overflow,
            record.loss_scale,
            record.global_norm,
            int(record.tokens_per_second),
            timedelta(seconds=int(max(left, 0))),
        )

    def _judge(self, record: StepRecord) -> None:
        if not record.is_finite:
            raise UserError(
                f"step {record.step}: the loss is {record.loss} (LM loss {record.lm_loss}), training stops. "
                f"{self._last_good(record)} Lower the learning rate, warm up longer, or check the data."
            )
        if not record.overflow:
            self.overflowed.clear()
            return
        self.overflowed.append(record.loss_scale)
        recent = self.overflowed[-SHORT_PATIENCE:]
        stuck = len(recent) == SHORT_PATIENCE and len(set(recent)) == 1
        if stuck or len(self.overflowed) >= PATIENCE:
            raise UserError(
                f"step {record.step}: gradients overflowed {len(self.overflowed)} steps in a row, now at loss scale "
                f"{record.loss_scale}; none of these steps changed the weights. {self._last_good(record)} "
                "Lower the learning rate or the loss scale."
            )

    def _judge_end(self, first: float) -> None:
        """Say that the run has ended worse than it began, or that its last steps changed nothing."""
        last = statistics.median(self.losses)
        if last > EXPLODED * first:
            found = f"it has not learned: the LM loss of its last steps is {last:.4g}, of its first {first:.4g}"
        elif len(self.overflowed) >= LAST:
            found = f"gradients overflowed in its last {len(self.overflowed)} steps, which changed no weights"
        else:
            return
        text = f"warning: the run has ended, but {found}. Lower the learning rate, warm up longer, or check the data."
        self.log("%s", text)
        current().say(text)

    def _last_good(self, record: StepRecord) -> str:
        """Sets aside the checkpoints that hold the weights of this failure, and names the newest of the others."""
        if self.folder is None:
            return "No checkpoint exists."
        # steps before this one whose gradients overflowed changed nothing: the weights are older than they
        failing = record.step - 1 - len(self.overflowed) + (0 if not record.is_finite else 1)
        place = (failing - 1) // self.per_epoch + 1, (failing - 1) % self.per_epoch + 1
        moved = set_aside(self.folder, place, self.began) if failing > 0 else []
        more = f" {', '.join(path.name for path in moved)} holds the weights that led here." if moved else ""
        return last_good(self.folder, self.suffix) + more
