# SPDX-License-Identifier: Apache-2.0
"""Training by an engine of ours, without MindFormers: data, steps, log, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.cluster.cluster_rules import settled
from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.lora import ADAPTER_CONFIG
from mindformers_ext.core.config.train import TrainSpec, train_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger, set_up_logging
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.checkpoint.saved import set_aside
from mindformers_ext.jobs.engine.door import open_trainer
from mindformers_ext.jobs.engine.protocols import Trainer
from mindformers_ext.jobs.predict.network import open_weights
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StepRecord
from mindformers_ext.jobs.train.checkpoint_folder import CheckpointFolder, Resumed
from mindformers_ext.jobs.train.token_data import TokenData

PATIENCE = 50  # steps in a row whose gradients overflow before the run gives up
SHORT_PATIENCE = 5  # the same while the loss scale stands still: then no later step can differ
LINE = (
    "{ Epoch:[%3d/%3d], step:[%5d/%5d], loss: %.6f, lm_loss: %.6f, aux_loss: %.6f, drop_rate: %.2f%%, "
    "per_step_time: %dms, lr: %.4e, overflow cond: %s, loss_scale: %s, global_norm: %.4f, tokens/s: %d, "
    "remaining: %s }"
)


@dataclass
class Run:
    """An opened run: what ``train`` goes through."""

    config: Mapping[str, Any]
    train: TrainSpec
    data: TokenData
    trainer: Trainer
    folder: Path
    first: int = 0


def run(config: Mapping[str, Any], spec: NetworkSpec, notes: tuple[str, ...] = ()) -> None:
    """``run_mode`` train, finetune or eval of a checked configuration, by the PyTorch engine."""
    if config["run_mode"] == "eval":
        raise UserError(
            "run_mode eval of the PyTorch engine measures perplexity on one device, without pet_config: "
            "leave out --use_parallel, and merge adapters first (tools/merge_lora.py)"
        )
    train(config, spec, notes)


def train(config: Mapping[str, Any], spec: NetworkSpec, notes: tuple[str, ...] = ()) -> None:
    """Train as the checked ``config`` says; see ``mf.run.run`` for the same through MindFormers.

    Raises:
        UserError: a key that the engine cannot do, data or weights that do not fit, a loss that is not a number.
    """
    spec = settled(spec)[0]
    folder = Path(config["output_dir"])
    runner = config.get("runner_config") or {}
    rows = spec.batch_size * int(runner.get("gradient_accumulation_steps") or 1)
    processes = 1 if spec.parallel.parallel_mode == "stand_alone" else spec.parallel.device_num
    data = TokenData(config, "train_dataset", rows * processes)
    moe = spec.model.moe
    bias_rate = moe.topk_bias_update_rate if moe and moe.balance_via_topk_bias else 0.0
    training, more = train_spec_from_yaml(config, spec.parallel, data.per_epoch, bias_rate)
    if spec.numerics.softmax_dtype != "float32":
        more.append(f"softmax_compute_type {spec.numerics.softmax_dtype}: PyTorch's attention sums in float32")
    context = config.get("context") or {}
    trainer = open_trainer(
        spec, training, str(context.get("device_target", "Ascend")), int(context.get("device_id") or 0)
    )
    rank = trainer.ranks.rank
    set_up_logging(file=folder / "log" / f"rank_{rank}" / "info.log")
    for note in (*notes, *more):
        get_logger(__name__).info("%s", note)
    run = Run(config, training, data, trainer, folder)
    if rank == 0:
        _keep_config(run)
    _load(run, spec)
    try:
        _steps(run)
    finally:
        data.close()
    trainer.ranks.close()  # after a failure the other ranks may not come any more


def _keep_config(run: Run) -> None:
    """What the run was asked to do, and what ``tools/merge_lora.py`` must know about adapters."""
    path = run.folder / "run_config" / f"{run.config['run_mode']}.yaml"
    with fresh_file(path, overwrite=True) as beside:
        beside.write_text(dump_yaml(dict(run.config)), encoding="utf-8")
    if run.train.lora:
        with fresh_file(run.folder / ADAPTER_CONFIG, overwrite=True) as beside:
            beside.write_text(json.dumps(run.train.lora.peft_words(), indent=1) + "\n", encoding="utf-8")


def _load(run: Run, spec: NetworkSpec) -> None:
    """Weights, then the optimizer; a resumed run takes both and its step from one checkpoint."""
    name, resume = run.config.get("load_checkpoint"), run.config.get("resume_training")
    if resume and name:
        path = Path(name)
        found = Resumed(path if path.is_file() else path / "rank_0" / str(resume))
        try:
            run.trainer.fill(found.weights())
            run.trainer.open()
            run.trainer.restore(found.state())
            run.first = found.step
        finally:
            found.close()
        get_logger(__name__).info("Resumed from %s at step %d", found.path, run.first)
        return
    if name:
        strategies = run.config.get("src_strategy_path_or_dir")
        weights = open_weights(Path(name), spec.model, Path(strategies) if strategies else None)
        try:
            run.trainer.fill(weights.plan.run(weights.reader))
        finally:
            weights.close()
        get_logger(__name__).info("Weights: %s", weights.what)
    run.trainer.open()


def _steps(run: Run) -> None:
    train, trainer, data, rank = run.train, run.trainer, run.data, run.trainer.ranks.rank
    mine = trainer.ranks.share(data.rows)
    metrics = MetricsFile(str(run.folder), rank, run.first)
    plan = train.checkpoint
    files = CheckpointFolder(run.folder, plan, data.per_epoch) if plan else None
    watch = _Watch(files, data.per_epoch)
    recent: deque[float] = deque(maxlen=20)
    started = time.perf_counter()
    for number in range(run.first + 1, train.steps + 1):
        columns = data.batch(number - 1, mine)
        figures = trainer.step(columns)
        now = time.perf_counter()
        record = _record(figures, number, data.per_epoch, now - started, columns[0])
        started = now
        if number > run.first + 1:
            recent.append(record.seconds)
        metrics.append(record)
        if (number - run.first - 1) % train.print_every == 0 or not record.is_finite:
            _show(record, data.per_epoch, train.steps, recent)
        watch.judge(record)
        if files:
            files.prune()
            if files.due(number, train.steps):
                _save(run, files, record)
        started += time.perf_counter() - now  # what is between steps is no part of them
    if files:
        files.prune()


def _record(figures: Any, step: int, per_epoch: int, seconds: float, ids: np.ndarray) -> StepRecord:
    """A row of the metrics file. Tokens per second are this process's; the last token of a row is a target only."""
    tokens = ids.shape[0] * (ids.shape[1] - 1)
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
        tokens_per_second=tokens / max(seconds, 1e-9),
        dropped=[float(share) for share in figures.dropped],
        expert_load=figures.expert_load.astype(float).tolist(),
    )


def _show(record: StepRecord, per_epoch: int, steps: int, recent: deque[float]) -> None:
    left = (steps - record.step) * (statistics.median(recent) if recent else record.seconds)
    get_logger(__name__).info(
        LINE,
        record.epoch,
        -(-steps // per_epoch),
        (record.step - 1) % per_epoch + 1,
        per_epoch,
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


def _save(run: Run, files: CheckpointFolder, record: StepRecord) -> None:
    """Every rank hands over its slices; the first one writes."""
    state = run.trainer.state(adapters=run.train.lora is not None)
    if run.trainer.ranks.rank:
        for _ in state:
            pass
        return
    more = {
        "epoch_num": np.array(record.epoch),
        "step_num": np.array(record.step),
        "loss_scale": np.array(record.loss_scale, np.float32),
        "global_batch_size": np.array(run.data.rows),
    }
    path = files.write(record.step, state, more)
    meta = files.folder / "meta.json"
    beside = meta.with_name(f".{meta.name}.{os.getpid()}")
    beside.write_text(
        json.dumps(
            {
                "last_epoch": record.epoch,
                "last_step": (record.step - 1) % run.data.per_epoch + 1,
                "last_ckpt_file": path.name,
            }
        ),
        encoding="utf-8",
    )
    os.replace(beside, meta)


class _Watch:
    """Stops a run whose loss is not a number, or whose gradients overflow without end."""

    def __init__(self, files: CheckpointFolder | None, per_epoch: int) -> None:
        self.files, self.per_epoch = files, per_epoch
        self.began = time.time()
        self.overflowed: list[float] = []

    def judge(self, record: StepRecord) -> None:
        """Raise ``UserError`` when it is time to stop."""
        if not record.is_finite:
            raise UserError(
                f"step {record.step}: the loss is {record.loss} (LM loss {record.lm_loss}), training "
                f"stops. {self._last_good(record)} Lower the learning rate, warm up longer, or check the "
                "data."
            )
        if not record.overflow:
            self.overflowed.clear()
            return
        self.overflowed.append(record.loss_scale)
        recent = self.overflowed[-SHORT_PATIENCE:]
        stuck = len(recent) == SHORT_PATIENCE and len(set(recent)) == 1
        if stuck or len(self.overflowed) >= PATIENCE:
            raise UserError(
                f"step {record.step}: gradients overflowed {len(self.overflowed)} steps in a row, now at "
                f"loss scale {record.loss_scale}; none of these steps changed the weights. "
                f"{self._last_good(record)} Lower the learning rate or the loss scale."
            )

    def _last_good(self, record: StepRecord) -> str:
        """Sets aside the checkpoints that hold the weights of this failure, and names the newest of the others."""
        if self.files is None:
            return "No checkpoint exists."
        failing = record.step - 1 - len(self.overflowed)
        place = (failing - 1) // self.per_epoch + 1, (failing - 1) % self.per_epoch + 1
        moved = set_aside(self.files.folder, place, self.began) if failing > 0 else []
        more = f" {', '.join(path.name for path in moved)} holds the weights that led here." if moved else ""
        return self.files.last_good() + more
