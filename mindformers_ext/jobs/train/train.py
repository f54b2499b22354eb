# SPDX-License-Identifier: Apache-2.0
"""Training by our own loop, on either engine, without MindFormers: data, steps, log, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.cluster.cluster_rules import effective_spec
from mindformers_ext.core.config.lora import DROPOUT_SEED
from mindformers_ext.core.config.pruning import pruning_from_yaml, with_pruning
from mindformers_ext.core.config.recompute import recompute_from_yaml
from mindformers_ext.core.config.run import FRAMEWORKS, MINDSPORE, RunSpec
from mindformers_ext.core.config.train import OWN_LOOPS, TrainSpec, train_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger, set_up_logging
from mindformers_ext.core.preferences import holds_pairs
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.engine.door import open_trainer
from mindformers_ext.jobs.engine.protocols import Trainer
from mindformers_ext.jobs.predict.network import open_weights
from mindformers_ext.jobs.prune.one_shot.warm_start import first_masks
from mindformers_ext.jobs.run.dataset import rows_of_step
from mindformers_ext.jobs.run.display import COMPILING, current
from mindformers_ext.jobs.run.keep import keep_config, keep_lora
from mindformers_ext.jobs.run.metrics_file import MetricsFile, StepRecord, record_of
from mindformers_ext.jobs.run.mixture import open_mixture
from mindformers_ext.jobs.run.mixture_checks import DATA
from mindformers_ext.jobs.run.quiet import Passed
from mindformers_ext.jobs.run.watch import Watch
from mindformers_ext.jobs.train.checkpoint_folder import CheckpointFolder, Resumed
from mindformers_ext.jobs.train.domain_losses import DomainLosses, target_losses
from mindformers_ext.jobs.train.hooks import (
    BIAS,
    AdapterDropout,
    BiasBalance,
    LoadLog,
    TrainHook,
    hook_state,
    restore_hooks,
)
from mindformers_ext.jobs.train.mixture_data import MixtureData
from mindformers_ext.jobs.train.pairs import PairData
from mindformers_ext.jobs.train.pruning_masks import PruningMasks
from mindformers_ext.jobs.train.token_data import BatchSource, TokenData, check_words


@dataclass
class Run:
    """An opened run: what ``train`` goes through."""

    asked: RunSpec
    train: TrainSpec
    data: BatchSource
    trainer: Trainer
    folder: Path
    hooks: list[TrainHook] = field(default_factory=list)
    first: int = 0
    left: dict[str, np.ndarray] = field(default_factory=dict)  # the hooks' state of a resumed run


def train(
    asked: RunSpec,
    config: Mapping[str, Any],
    spec: NetworkSpec,
    notes: tuple[str, ...] = (),
    source: BatchSource | None = None,
    hooks: tuple[TrainHook, ...] = (),
) -> None:
    """Train as the checked ``config`` says; see ``mf.run.run`` for the same through MindFormers.

    Args:
        asked: the run, checked.
        config: the YAML's content, from which the schedule, the optimizer and the callbacks are read.
        spec: its network.
        notes: lines for the log.
        source: other rows than those of ``train_dataset``.
        hooks: more than the callbacks ask for.

    Raises:
        UserError: a key that the engine cannot do, data or weights that do not fit, a loss that is not a number.
    """
    spec, engine = effective_spec(spec)[0], asked.engine
    folder = Path(asked.output_dir)
    data = source or open_rows(asked, config, spec)
    training, more = _how_to_train(asked, config, spec, data.per_epoch)
    masks = first_masks(training.pruning) if training.pruning else {}
    targets = target_losses(data, asked, spec) if isinstance(data, MixtureData) else None
    current().begin(f"opening {FRAMEWORKS[engine]} and building the network")
    trainer = open_trainer(engine, spec, training, asked.device)
    current().done()
    rank = trainer.ranks.rank
    set_up_logging(file=folder / "log" / f"rank_{rank}" / "info.log", more=[Passed()])
    for note in (*notes, *more):
        get_logger(__name__).info("%s", note)
    for note in more:
        current().say(f"note: {note}")
    run = Run(asked, training, data, trainer, folder)
    if rank == 0:
        keep_config(config, folder)
        keep_lora(training.lora, folder, asked)
    _load(run, spec)
    if training.pruning:  # before what evaluates: it sets the masks of evaluation
        if masks and not run.first:
            trainer.set_values(masks)
        every = data.mixture.interval if isinstance(data, MixtureData) else 0
        run.hooks.append(PruningMasks(training.pruning, training.seed, trainer, every))
    if isinstance(data, MixtureData):
        run.hooks.append(DomainLosses(data, trainer, spec.model, spec.batch_size, targets))
    run.hooks += [*hooks_of(training, trainer, spec.model.moe_layers), *hooks]
    restore_hooks(run.hooks, run.left)
    if isinstance(data, PairData):
        data.measure(trainer, spec.batch_size)
    try:
        _steps(run)
    finally:
        data.close()
    trainer.ranks.close()  # after a failure the other ranks may not come any more


def _how_to_train(
    asked: RunSpec, config: Mapping[str, Any], spec: NetworkSpec, per_epoch: int
) -> tuple[TrainSpec, list[str]]:
    """The settings of the training and notes on them; ``per_epoch``: steps of an epoch."""
    moe, engine = spec.model.moe, asked.engine
    bias_rate = moe.topk_bias_update_rate if moe and moe.balance_via_topk_bias else 0.0
    training, notes = train_spec_from_yaml(config, spec.parallel, per_epoch, bias_rate, engine)
    if pruning := pruning_from_yaml(config, spec.model):
        training = with_pruning(training, pruning)
    if engine == MINDSPORE:
        training = replace(training, recomputed=recompute_from_yaml(config, spec))
    elif spec.numerics.softmax_dtype != "float32":
        notes.append(f"softmax_compute_type {spec.numerics.softmax_dtype}: PyTorch's attention sums in float32")
    return training, notes


def open_rows(asked: RunSpec, config: Mapping[str, Any], spec: NetworkSpec) -> BatchSource:
    """The training rows: a mixture's, or those of one data set, which MindRecord deals out to the processes of data
    parallel one by one."""
    rows, processes = rows_of_step(asked, spec)
    if asked.data and asked.data.mixture:
        check_words(
            config["train_dataset"], config["train_dataset"]["data_loader"], "train_dataset", OWN_LOOPS[asked.engine]
        )
        mixture = open_mixture(asked.data.mixture)
        return MixtureData(mixture, asked.data.seed, rows, asked.data.columns, spec.model.vocab_size)
    shards = processes if spec.parallel.parallel_mode == "data_parallel" else 1
    kind = PairData if asked.data and holds_pairs(asked.data.columns) else TokenData
    return kind(config, "train_dataset", rows, shards, asked.engine, spec.model.vocab_size)


def hooks_of(train: TrainSpec, trainer: Trainer, layers: tuple[int, ...] = ()) -> list[TrainHook]:
    """The hooks that the configuration's callbacks ask for, over an opened trainer."""
    log, hooks = get_logger(__name__), list[TrainHook]()
    if train.bias_rate:
        hooks.append(BiasBalance(train.bias_rate, trainer.values(BIAS)))
    if train.load_every:
        hooks.append(LoadLog(log.info, log.warning, train.load_every, layers))
    if train.lora and (seeds := trainer.values(DROPOUT_SEED)):
        hooks.append(AdapterDropout(train.seed, trainer.ranks.rank, seeds))
    return hooks


def _load(run: Run, spec: NetworkSpec) -> None:
    """Weights, then the optimizer; a resumed run takes both and its step from one checkpoint."""
    name = run.asked.load
    if run.asked.resume and name:
        _resume(run, Path(name), spec)
        return
    if name:
        with closing(open_weights(Path(name), spec.model, run.asked.strategies)) as weights:
            run.trainer.fill(weights.plan.run(weights.reader))
        get_logger(__name__).info("Weights: %s", weights.what)
    run.trainer.open()


def _resume(run: Run, path: Path, spec: NetworkSpec) -> None:
    asked, lora = run.asked, run.train.lora is not None
    slices = asked.strategies if path.is_dir() and not lora else None
    with ExitStack() as stack:
        found = Resumed(path if path.is_file() else path / "rank_0" / str(asked.resume), slices)
        stack.callback(found.close)
        below: Iterable[tuple[str, np.ndarray]] = ()
        if asked.base:
            base = open_weights(Path(asked.base), spec.model, asked.strategies)
            stack.callback(base.close)
            below = base.plan.run(base.reader)
        run.data.restore(found.data(), found.step, str(found.path))
        run.first, state = counted_anew(found, run.data.rows)
        run.trainer.fill(chain(below, found.weights()), partly=lora and not asked.base)
        run.trainer.open()
        run.trainer.restore(state)
        run.left = found.hooks()
    get_logger(__name__).info("Resumed from %s at step %d", found.path, run.first)
    current().say(f"Resumed from {found.path} at step {run.first}")


def counted_anew(found: Resumed, rows: int) -> tuple[int, dict[str, np.ndarray]]:
    """Steps done and the optimizer's state, in steps of ``rows`` rows, as MindFormers counts them anew.

    Raises:
        UserError: no whole number of such steps.
    """
    step, state = found.step, found.state()
    if found.rows in (0, rows):
        return step, state
    if step * found.rows % rows:
        raise UserError(
            f"cannot resume from {found.path}: {step} steps of {found.rows} rows are no whole number of steps of "
            f"{rows}; choose batch_size, gradient_accumulation_steps and the number of processes so that a step takes "
            f"{found.rows} rows, or a part or a multiple of them"
        )
    updates = int(np.asarray(state["global_step"]).reshape(-1)[0])
    state["global_step"] = np.array([updates * found.rows // rows], np.int32)
    first = step * found.rows // rows
    current().say(f"note: a step takes {rows} rows, {found.rows} before: step {step} becomes step {first}")
    return first, state


def _steps(run: Run) -> None:
    train, trainer, data, rank = run.train, run.trainer, run.data, run.trainer.ranks.rank
    mine = trainer.ranks.share(data.rows)
    metrics = MetricsFile(str(run.folder), rank, run.first)
    plan = train.checkpoint
    files = CheckpointFolder(run.folder, plan, data.per_epoch) if plan else None
    watch = Watch(
        get_logger(__name__).info,
        files.folder if files else None,
        data.per_epoch,
        train.steps,
        run.first,
        train.print_every,
        plan.suffix if plan else ".ckpt",
    )
    if run.asked.compiles:
        current().begin(COMPILING)
    started = time.perf_counter()
    _set_inputs(run, run.first + 1)
    for number in range(run.first + 1, train.steps + 1):
        columns = data.batch(number - 1, mine)
        figures = trainer.step(columns)
        now = time.perf_counter()
        for hook in run.hooks:
            figures = figures._replace(extra={**figures.extra, **hook.measured(number, figures)})
        rows = 2 * len(columns[0]) if isinstance(data, PairData) else len(columns[0])
        tokens = rows * (columns[0].shape[1] - 1)  # the last token of a row is a target only
        record = record_of(figures, number, data.per_epoch, now - started, tokens)
        started = now
        metrics.append(record)
        watch.see(record)
        for hook in run.hooks:
            hook.after_step(number, figures)
        _set_inputs(run, number + 1)
        if files:
            files.prune()
            if files.due(number, train.steps):
                _save(run, files, record)
        started += time.perf_counter() - now  # what is between steps is no part of them
    if files:
        files.prune()


def _set_inputs(run: Run, step: int) -> None:
    """What the hooks give the network for ``step``; a checkpoint of the step before holds it already."""
    for hook in run.hooks:
        run.trainer.set_values(hook.inputs(step))


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
        **hook_state(run.hooks),
        **{f"{DATA}{name}": array for name, array in run.data.state().items()},
    }
    path = files.write(record.step, state, more)
    words = {
        "last_epoch": record.epoch,
        "last_step": (record.step - 1) % run.data.per_epoch + 1,
        "last_ckpt_file": path.name,
    }
    write_text(files.folder / "meta.json", json.dumps(words))
