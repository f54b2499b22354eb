# SPDX-License-Identifier: Apache-2.0
"""The monitor: one log line and one metrics row a step, TensorBoard, and the stop when the loss is not a number."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.core.callback.callback import MFLossMonitor
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindformers.utils.tensorboard import get_tensorboard_writer

from mindformers_ext.jobs.run.dataset import check_ids
from mindformers_ext.jobs.run.display import COMPILING, current
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StepRecord, record_of
from mindformers_ext.jobs.run.watch import Watch
from mindformers_ext.mf.hooks import HOOKS, figures_at
from mindformers_ext.mf.lean import without
from mindformers_ext.mf.mixture import SOURCE
from mindformers_ext.mf.step import real_model

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


class MoELossMonitor(MFLossMonitor):
    """``MFLossMonitor`` that also shows LM loss, aux loss, drop rate and tokens/s, and keeps the figures.

    Args:
        per_print_times: log every n-th step; every step goes to the metrics file.
        tensorboard: also write TensorBoard events (to MindFormers' writer if the YAML configures one, otherwise to
            ``<output_dir>/tensorboard/rank_<rank>``).
        given: MindFormers' arguments of ``MFLossMonitor``.

    Raises:
        UserError: while training, see ``jobs.run.watch``.
    """

    def __init__(self, per_print_times: int = 1, tensorboard: bool = True, **given: Any) -> None:
        super().__init__(per_print_times=per_print_times, **given)
        self.wants_tensorboard = tensorboard
        self.metrics: MetricsFile | None = None
        self.watch: Watch | None = None
        self.writer: Any = None
        self.owns_writer = False

    def on_train_begin(self, run_context: Any) -> None:
        """Open the metrics file and the TensorBoard writer."""
        output_dir, rank = get_output_root_path(), get_real_rank()
        self.metrics = MetricsFile(output_dir, rank, self.initial_step)
        steps = self.steps_per_epoch or run_context.original_args().batch_num
        self.watch = Watch(
            logger.info,
            Path(output_dir) / "checkpoint" / f"rank_{rank}",
            steps,
            (self.origin_epochs or 1) * steps,
            self.initial_step,
            self.per_print_times,
        )
        if self.wants_tensorboard:
            self.writer = get_tensorboard_writer()
            if self.writer is None:
                with without("torch"):
                    from tensorboardX import SummaryWriter

                folder = Path(output_dir) / "tensorboard" / f"rank_{rank}"
                self.writer = SummaryWriter(logdir=str(folder), purge_step=self.initial_step + 1)
                self.owns_writer = True
        if ms.get_context("mode") == ms.GRAPH_MODE:
            current().begin(COMPILING)  # with the first step

    def on_train_step_begin(self, run_context: Any) -> None:
        """Look at the step's ids: beyond the embedding MindSpore reads anything, or ends without a word about the data.

        Only the first rows were looked at before the run (``jobs.run.dataset``); in sink mode no step's rows are seen.
        """
        super().on_train_step_begin(run_context)
        parameters = run_context.original_args()
        batch, spec = parameters.train_dataset_element, getattr(real_model(parameters.train_network), "spec", None)
        if batch and spec is not None:
            step = self.initial_step + parameters.cur_step_num
            check_ids([item.asnumpy() for item in batch], spec.model.vocab_size, f"the rows of step {step}")

    def on_train_step_end(self, run_context: Any) -> None:
        """Record, show and judge the step."""
        assert self.watch is not None and self.metrics is not None
        parameters = run_context.original_args()
        figures = figures_at(parameters)  # waits for the device; only then is the step's time known
        done = parameters.batch_num if parameters.dataset_sink_mode else 1
        seconds = (time.time() - self.step_time) / done
        step = self.initial_step + parameters.cur_step_num
        tokens = self._tokens(parameters.train_dataset_element)
        if SOURCE in parameters:
            figures = figures._replace(extra={**figures.extra, **parameters[SOURCE].figures(step)})
        for hook in parameters.get(HOOKS, ()):
            figures = figures._replace(extra={**figures.extra, **hook.measured(step, figures)})
        record = record_of(figures, step, self.watch.per_epoch, seconds, tokens)
        self.metrics.append(record)
        self._draw(record)
        self.watch.see(record)

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

    def _draw(self, record: StepRecord) -> None:
        if self.writer is None:
            return
        for name in SCALARS:
            self.writer.add_scalar(name, getattr(record, name), global_step=record.step)
        if len(record.expert_load[0]) > 1:
            for layer, load in enumerate(record.expert_load):
                shares = {f"expert_{expert}": count / max(sum(load), 1.0) for expert, count in enumerate(load)}
                self.writer.add_scalars(f"expert_load/layer_{layer}", shares, global_step=record.step)
