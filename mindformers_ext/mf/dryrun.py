# SPDX-License-Identifier: Apache-2.0
"""One rank of a job that is compiled and never run: the same path as ``mf.run`` up to the finished train step, or as
``jobs.predict.predict`` up to the compiled graphs.

Runs in a process of its own whose environment puts MindSpore's Ascend compiler on stand-ins of CANN
(``jobs.dryrun.stubs``). There a graph can be compiled but no step computed, so the trainer stops where training starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.trainer import Trainer
from mindspore import Tensor, nn
from mindspore.common.initializer import Initializer

from mindformers_ext.core.cluster.cluster_rules import effective_spec
from mindformers_ext.core.cluster.tensor_parallel import parted_parameters
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.jobs.predict.generate import Shape
from mindformers_ext.jobs.predict.network import dropless_spec
from mindformers_ext.mf.run import prepare
from mindformers_ext.mf.trainer import PortableCausalLanguageModelingTrainer
from mindformers_ext.ms.engine import MindSporeEngine
from mindformers_ext.ms.mindrecord import write_mindrecord

BUILDING, COMPILING = "building the network", "compiling"  # phases of a rank
TOKEN = 5  # every token of the synthetic rows; no value is ever computed


class TrainStepBuiltError(Exception):
    """Carries the finished train step out of MindFormers' trainer."""

    def __init__(self, step: nn.Cell, dataset: Any) -> None:
        super().__init__("the train step is built")
        self.step, self.dataset = step, dataset


class CompileOnlyTrainer(PortableCausalLanguageModelingTrainer):
    """Builds data, network, optimizer and train step as every run does, then stops."""

    def create_model_wrapper(self, network: nn.Cell, optimizer: nn.Optimizer) -> nn.Cell:
        """Build the train step and raise ``TrainStepBuiltError`` with it."""
        raise TrainStepBuiltError(super().create_model_wrapper(network, optimizer), self.train_dataset)


@dataclass(frozen=True)
class CompiledStep:
    """Whole shapes of all parameters, which of them are trained, the batch's shapes, and seconds per phase."""

    shapes: dict[str, tuple[int, ...]]
    trained: tuple[str, ...]
    batch: tuple[tuple[int, ...], ...]
    build_seconds: float
    compile_seconds: float


def compile_step(
    config: Mapping[str, Any], rows: int, folder: Path, native: bool, tell: Callable[[str], None]
) -> CompiledStep:
    """Compile this rank's train step of ``config``.

    Args:
        config: a checked configuration; its data set is replaced by ``rows`` synthetic rows.
        rows: at least one step's.
        folder: where the synthetic data goes.
        native: compile MindFormers' own network and train step instead of ours.
        tell: hears of each phase as it begins.
    """
    tell(BUILDING)
    started = time.time()
    full = prepare(with_synthetic_data(config, rows, folder), native=native)
    MindFormerRegister.register_cls(CompileOnlyTrainer, MindFormerModuleType.TRAINER)
    full.trainer.type = CompileOnlyTrainer.__name__
    try:
        Trainer(full).train()
    except TrainStepBuiltError as built:
        step, dataset = built.step, built.dataset
    else:
        raise RuntimeError("MindFormers' trainer ended before the train step was built")
    shapes = {parameter.name: tuple(parameter.shape) for parameter in step.get_parameters()}
    trained = tuple(parameter.name for parameter in step.optimizer.parameters)
    batch = tuple(tuple(shape) for shape in dataset.output_shapes())
    step.set_train()
    built_at = time.time()
    tell(COMPILING)
    with weights_left_out():
        columns = [Tensor(np.full(shape, TOKEN, np.int32)) for shape in batch]
        if getattr(step, "noise", None) is not None:
            columns.append(step.noise.column(0, batch[0][0]))
        step.compile(*columns)
    logger.info("Dry run: the train step is compiled.")
    return CompiledStep(shapes, trained, batch, built_at - started, time.time() - built_at)


@dataclass(frozen=True)
class CompiledPrediction:
    """Whole shapes of all weights, what was compiled (``jobs.dryrun.facts.GRAPHS_OF``), and seconds per phase."""

    shapes: dict[str, tuple[int, ...]]
    graphs: tuple[str, ...]
    build_seconds: float
    compile_seconds: float


def compile_prediction(
    config: Mapping[str, Any], shape: Shape, world: int, tell: Callable[[str], None]
) -> CompiledPrediction:
    """Compile this rank's graphs of a prediction by ``world`` processes; without ``use_past`` only the one that reads.

    MindFormers has no part in it: ``jobs.predict.predict`` answers without. ``tell`` hears of each phase.
    """
    tell(BUILDING)
    started = time.time()
    run = run_spec_from_yaml(config)
    spec = dropless_spec(effective_spec(network_spec_from_yaml(config, world))[0], run.device)
    engine = MindSporeEngine()
    engine.use(run.device)
    network = engine.build(spec, empty=True)
    built = time.time()
    tell(COMPILING)
    with weights_left_out():
        network.session(shape.rows, shape.length, shape.positions, run.cached)
    shapes = {item.name: item.whole for item in parted_parameters(spec, world)}
    graphs = ("prompt", "token") if run.cached else ("prompt",)
    return CompiledPrediction(shapes, graphs, built - started, time.time() - built)


@contextmanager
def weights_left_out() -> Iterator[None]:
    """MindSpore fills this rank's slice of every weight once the graph is compiled: minutes and tens of gigabytes at
    full width, for values that nobody reads. Memory that nothing is written to costs none."""
    fill = Initializer.__call__
    Initializer.__call__ = _untouched
    try:
        yield
    finally:
        Initializer.__call__ = fill


def _untouched(initializer: Initializer, array: np.ndarray) -> np.ndarray:
    return array


def with_synthetic_data(config: Mapping[str, Any], rows: int, folder: Path) -> dict[str, Any]:
    """``config`` with its training data replaced by ``rows`` equal rows of seq_length + 1 tokens, one step's: masks
    reach no target in that, which no graph depends on."""
    written = config.get("train_dataset") or {}
    columns = tuple(written.get("input_columns") or ("input_ids",))
    width = int(config["model"]["model_config"].get("seq_length", 2048)) + 1
    path = folder / "synthetic.mindrecord"
    row = {column: np.full(width, TOKEN, np.int32) for column in columns}
    write_mindrecord(path, (row for _ in range(rows)), columns)
    dataset = {
        **written,
        "input_columns": list(columns),
        "data_loader": {"type": "MindDataset", "dataset_dir": str(path), "shuffle": False},
        "drop_remainder": True,
        "num_parallel_workers": 1,
    }
    task = {"type": "CausalLanguageModelDataset", "dataset_config": dataset}
    model = config["model"]
    if masks := model["model_config"].get("l0_module"):
        words = {**model["model_config"], "l0_module": {**masks, "lagrangian_warmup_steps": 0}}
        model = {**model, "model_config": words}
    return {**config, "model": model, "train_dataset": dataset, "train_dataset_task": task}
