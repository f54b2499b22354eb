# SPDX-License-Identifier: Apache-2.0
"""The monitor: one log line and one metrics row a step, TensorBoard, and the stop when the loss is not a number."""

from __future__ import annotations

import statistics
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from mindformers.core.callback.callback import MFLossMonitor
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindformers.utils.tensorboard import get_tensorboard_writer

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.saved import last_whole, set_aside
from mindformers_ext.mf.metrics import MetricsFile, StepRecord, record_of

SCALARS = (
    "loss",
    "lm_loss",
    "aux_loss",
    "drop_rate",
    "learning_rate",
    "global_norm",
    "loss_scale",
    "tokens_per_second",
)
PATIENCE = 50  # steps in a row whose gradients overflow before the run gives up
SHORT_PATIENCE = 5  # the same while the loss scale stands still: then no later step can differ


class MoELossMonitor(MFLossMonitor):
    """``MFLossMonitor`` that also shows LM loss, aux loss, drop rate and tokens/s, and keeps the figures.

    Args:
        per_print_times: log every n-th step; every step goes to the metrics file.
        tensorboard: also write TensorBoard events (to MindFormers' writer if the YAML configures one, otherwise to
            ``<output_dir>/tensorboard/rank_<rank>``).
        given: MindFormers' arguments of ``MFLossMonitor``.

    Raises:
        UserError: while training, when the loss is not finite, or when gradients overflow 50 steps in a row (5 while
            the loss scale is fixed or at its floor).
    """

    def __init__(self, per_print_times: int = 1, tensorboard: bool = True, **given: Any) -> None:
        super().__init__(per_print_times=per_print_times, **given)
        self.wants_tensorboard = tensorboard
        self.metrics: MetricsFile | None = None
        self.writer: Any = None
        self.started = time.time()
        self.owns_writer = False
        self.recent: deque[float] = deque(maxlen=20)
        self.overflowed: list[float] = []  # loss scale of each step of the present streak

    def on_train_begin(self, run_context: Any) -> None:
        """Open the metrics file and the TensorBoard writer."""
        output_dir, rank = get_output_root_path(), get_real_rank()
        self.metrics = MetricsFile(output_dir, rank, self.initial_step)
        if self.wants_tensorboard:
            self.writer = get_tensorboard_writer()
            if self.writer is None:
                from tensorboardX import SummaryWriter

                folder = Path(output_dir) / "tensorboard" / f"rank_{rank}"
                self.writer = SummaryWriter(logdir=str(folder), purge_step=self.initial_step + 1)
                self.owns_writer = True

    def on_train_step_end(self, run_context: Any) -> None:
        """Record, show and judge the step."""
        parameters = run_context.original_args()
        steps = self.steps_per_epoch or parameters.batch_num
        step = self.initial_step + parameters.cur_step_num
        outputs = parameters.net_outputs
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs, False, 1.0, float("nan"), float("nan"))
        loss = outputs[0].asnumpy()  # waits for the device; only then is the step's time known
        done = parameters.batch_num if parameters.dataset_sink_mode else 1
        seconds = (time.time() - self.step_time) / done
        tokens = self._tokens(parameters.train_dataset_element)
        record = record_of((loss, *outputs[1:]), step, (step - 1) // steps + 1, seconds, tokens)
        self._keep(record)
        if parameters.cur_step_num > 1:  # the first step compiles
            self.recent.append(seconds)
        if (parameters.cur_step_num - 1) % self.per_print_times == 0 or not record.is_finite:
            self._show(record, steps)
        self._judge(record, steps)

    def on_train_end(self, run_context: Any) -> None:
        """Close the TensorBoard writer if it is ours."""
        if self.writer is not None and self.owns_writer:
            self.writer.close()

    def _tokens(self, batch: Any) -> int:
        """Tokens per step and device: rows x (width - 1), the last token being a target only."""
        if not batch:
            return self.global_batch_size // self.device_num
        rows, width = batch[0].shape[:2]
        return int(rows) * (int(width) - 1)

    def _keep(self, record: StepRecord) -> None:
        if self.metrics is not None:
            self.metrics.append(record)
        if self.writer is None:
            return
        for name in SCALARS:
            self.writer.add_scalar(name, getattr(record, name), global_step=record.step)
        if len(record.expert_load[0]) > 1:
            for layer, load in enumerate(record.expert_load):
                shares = {f"expert_{expert}": count / max(sum(load), 1.0) for expert, count in enumerate(load)}
                self.writer.add_scalars(f"expert_load/layer_{layer}", shares, global_step=record.step)

    def _show(self, record: StepRecord, steps: int) -> None:
        epochs = self.origin_epochs or 1
        left = (epochs * steps - record.step) * (statistics.median(self.recent) if self.recent else record.seconds)
        logger.info(
            "{ Epoch:[%3d/%3d], step:[%5d/%5d], loss: %.6f, lm_loss: %.6f, aux_loss: %.6f, drop_rate: %.2f%%, "
            "per_step_time: %dms, lr: %.4e, overflow cond: %s, loss_scale: %s, global_norm: %.4f, tokens/s: %d, "
            "remaining: %s }",
            record.epoch,
            epochs,
            (record.step - 1) % steps + 1,
            steps,
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

    def _judge(self, record: StepRecord, steps: int) -> None:
        if not record.is_finite:
            raise UserError(
                f"step {record.step}: the loss is {record.loss} (LM loss {record.lm_loss}), training stops. "
                f"{self._last_good(record, steps)} Lower the learning rate, warm up longer, or check the data."
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
                f"{record.loss_scale}; none of these steps changed the weights. {self._last_good(record, steps)} "
                "Lower the learning rate or the loss scale."
            )

    def _last_good(self, record: StepRecord, steps: int) -> str:
        """Sets aside the checkpoints that hold the weights of this failure, and names the newest of the others."""
        folder = Path(get_output_root_path()) / "checkpoint" / f"rank_{get_real_rank()}"
        failing = record.step - 1 - self._streak_before(record)
        place = (failing - 1) // steps + 1, (failing - 1) % steps + 1
        moved = set_aside(folder, place, self.started) if failing > 0 else []
        found = last_whole(folder)
        text = f"The last good checkpoint is {found.path} (step {found.label})." if found else "No checkpoint is left."
        if moved:
            text += f" {', '.join(path.name for path in moved)} holds the weights that led here."
        return text

    def _streak_before(self, record: StepRecord) -> int:
        """Steps before this one that changed nothing because their gradients overflowed."""
        return len(self.overflowed) - (1 if record.is_finite else 0)
