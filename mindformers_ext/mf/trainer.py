# SPDX-License-Identifier: Apache-2.0
"""MindFormers' causal language modelling trainer with the parts it lacks off Ascend."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.core.callback.callback import CheckpointMonitor
from mindformers.core.optim import build_optim
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer
from mindspore import nn

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.lora import BESIDE_BASE
from mindformers_ext.core.config.pruning import pruning_groups
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.plain_file import AFRESH, open_plain
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file
from mindformers_ext.jobs.predict.network import open_weights
from mindformers_ext.jobs.train.hooks import PREFIX
from mindformers_ext.mf.balance import MoETopkBiasBalanceCallback
from mindformers_ext.mf.checkpoint import WholeCheckpointMonitor
from mindformers_ext.mf.hooks import DropoutSeeds, HookCallback
from mindformers_ext.mf.load_monitor import MoELoadMonitor
from mindformers_ext.mf.mixture import MixtureRows, MixtureTrack, rows_below
from mindformers_ext.mf.monitor import MoELossMonitor
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
from mindformers_ext.mf.noise import NoiseFed, noise_of
from mindformers_ext.mf.pipeline_step import LEFT_OUT, PortablePipelineStepCell, norm_tells_overflow
from mindformers_ext.mf.pruning import MaskInputs, ScaledRate
from mindformers_ext.mf.rules import experts_without_sequence_parallel
from mindformers_ext.mf.step import PortableTrainOneStepCell, real_model
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.engine import fill
from mindformers_ext.ms.optim import parameter_groups
from mindformers_ext.ms.step import STEP_STATE, TrainStepCell, step_state

# MindFormers hands a callback the run's facts (first step, schedule, batch) only when the YAML calls it by these names.
STAND_INS = {
    "MFLossMonitor": MoELossMonitor,
    "CheckpointMonitor": WholeCheckpointMonitor,
    "TopkBiasBalanceCallback": MoETopkBiasBalanceCallback,
    "MoEDropRateCallback": MoELoadMonitor,
}
BASE = "adapter_base"  # our key in MindFormers' configuration: RunSpec.base


class PortableCausalLanguageModelingTrainer(CausalLanguageModelingTrainer):
    """``CausalLanguageModelingTrainer`` plus: our callbacks behind MindFormers' names, gradient accumulation on one
    device and in data parallel, a resumed loss scale with its counters, and an evaluation whose result is kept."""

    mixture: MixtureRows | None = None  # of the data set that is trained on

    def training_process(self, *args: Any, **kwargs: Any) -> None:
        """Train with our callbacks in place of MindFormers' of the same name."""
        with stand_ins(), experts_without_sequence_parallel():
            super().training_process(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Evaluate, and keep the result as ``eval_result`` and in ``<output_dir>/eval.json``."""
        with experts_without_sequence_parallel():
            super().evaluate(*args, **kwargs)
        metrics = self.compute_metrics or {}
        self.eval_result = {name: metric.eval() for name, metric in metrics.items()}
        path = Path(get_output_root_path()) / "eval.json"
        with os.fdopen(open_plain(path, AFRESH), "w", encoding="utf-8") as file:
            file.write(json.dumps(self.eval_result, indent=1) + "\n")
        logger.info("Evaluation: %s, kept in %s", self.eval_result, path)

    def create_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """MindFormers' data set; a mixture below it is kept."""
        dataset = super().create_train_dataset(*args, **kwargs)
        self.mixture = rows_below(dataset)
        return dataset

    def create_optimizer_scheduler(self, network: nn.Cell, model_params: set[Any]) -> nn.Optimizer:
        """MindFormers' optimizer; of a network with masks with their groups, in the order of our own loop."""
        pruning = getattr(real_model(network), "pruning", None)
        if pruning is None:
            return super().create_optimizer_scheduler(network, model_params)
        config = self.config
        if not config.lr_schedule or config.grouped_lr_schedule is not None:
            raise UserError("l0_module needs lr_schedule, and no grouped_lr_schedule: masks have a group of their own")
        self.lr_scheduler = self.create_lr_scheduler(config.lr_schedule, config.lr_scale, config.lr_scale_factor)
        steps = int(config.runner_config.epochs * self.get_train_data_size())
        groups = parameter_groups(
            network.trainable_params(),
            pruning_groups(pruning, float(config.lr_schedule.learning_rate), steps),
            float(config.optimizer.weight_decay or 0.0),
            lambda factor: self.lr_scheduler if factor == 1.0 else ScaledRate(self.lr_scheduler, factor),
        )
        arguments = {"params": groups, "learning_rate": self.lr_scheduler}
        self.optimizer = build_optim(config.optimizer, default_args=arguments)
        return self.optimizer

    def _check_grad_accumulation_steps(self) -> None:
        """Keep the steps where our train step accumulates; MindFormers resets them to 1 outside semi-auto parallel."""
        steps = self.config.runner_config.gradient_accumulation_steps
        super()._check_grad_accumulation_steps()
        if self._step_accumulates() and isinstance(steps, int) and steps > 1:
            self.config.runner_config.gradient_accumulation_steps = steps
            self.config.runner_wrapper.gradient_accumulation_steps = steps
            logger.info("gradient_accumulation_steps: %d micro batches inside the portable train step.", steps)

    def wrap_network_with_tool_cells(self, network: nn.Cell) -> nn.Cell:
        """MindFormers' wrapping, without its accumulation cell where our train step accumulates."""
        runner = self.config.runner_config
        steps = runner.gradient_accumulation_steps
        if not self._step_accumulates():
            return super().wrap_network_with_tool_cells(network)
        runner.gradient_accumulation_steps = 1
        try:
            return super().wrap_network_with_tool_cells(network)
        finally:
            runner.gradient_accumulation_steps = steps

    def create_model_wrapper(self, network: nn.Cell, optimizer: nn.Optimizer) -> nn.Cell:
        """The train step; a resumed run gets its loss scale and the counters of a dynamic one back."""
        words = self.config.runner_wrapper
        is_ours = isinstance(real_model(network), PortableLlamaForCausalLM)
        if is_ours and words.type == "MFPipelineWithLossScaleCell" and norm_tells_overflow(words, self.config):
            words.type = PortablePipelineStepCell.__name__
            logger.info("MFPipelineWithLossScaleCell becomes %s: the clipping norm tells overflow", words.type)
        if is_ours and self.config.resume_training and real_model(network).adapted:
            fill_base(real_model(network), self.config.get(BASE), seed_of(self.config))
        if is_ours and not real_model(network).causal_lm.model.reports and self._shows_load():
            real_model(network).causal_lm.keep_reports()
        wrapper = super().create_model_wrapper(network, optimizer)
        if is_ours:
            check_climbs(wrapper, real_model(network))
            self._feed_noise(wrapper, real_model(network).spec)
        first = int(self.config.runner_config.initial_step or 0)
        if wrapper is not None:
            wrapper.first_step = first
        if self.mixture is not None:
            self.mixture.go_to(first)
        if isinstance(wrapper, TrainStepCell) and self.config.resume_training and self.config.checkpoint.load_path:
            restore_step_state(wrapper, self._resume_file())
        return wrapper

    def _feed_noise(self, wrapper: nn.Cell, spec: NetworkSpec) -> None:
        """Gates that add noise get it from the train step, which has to be one of ours."""
        noise = noise_of(spec, seed_of(self.config), get_real_rank())
        if noise is None:
            return
        if not isinstance(wrapper, NoiseFed):
            raise UserError(
                f"{type(wrapper).__name__} hands no noise to the gates: set runner_wrapper.use_clip_grad: True, leave "
                f"{', '.join(LEFT_OUT)} out, or set model.model_config.gate_add_noise: False"
            )
        wrapper.noise = noise

    def sort_callbacks(self, default_callbacks: list[Any]) -> list[Any]:
        """MindFormers' order, with hooks before the checkpoint, which holds what they set for the next step."""
        found = CausalLanguageModelingTrainer.sort_callbacks(default_callbacks)
        hooks = [item for item in found if isinstance(item, HookCallback)]
        others = [item for item in found if not isinstance(item, HookCallback)]
        place = next((i for i, item in enumerate(others) if isinstance(item, CheckpointMonitor)), len(others))
        tracks = [MixtureTrack(self.mixture)] if self.mixture is not None else []
        seed, every = seed_of(self.config), int(bool(self.config.do_eval))
        return [*tracks, *others[:place], *hooks, DropoutSeeds(seed), MaskInputs(seed, every), *others[place:]]

    def _shows_load(self) -> bool:
        return any(
            item.get("type") in ("MoEDropRateCallback", "MoELoadMonitor") for item in self.config.callbacks or ()
        )

    def _step_accumulates(self) -> bool:
        wrapper = self.config.runner_wrapper
        ours = wrapper is not None and wrapper.type == "PortableTrainOneStepCell"
        return ours and ms.get_auto_parallel_context("parallel_mode") not in SHARDED_MODES

    def _resume_file(self) -> Path | None:
        path = Path(self.config.checkpoint.load_path)
        rank = path / f"rank_{get_real_rank()}"
        name = self.config.resume_training
        if isinstance(name, str) and (rank / name).is_file():
            return rank / name
        return checkpoint_file(rank if rank.is_dir() else path)


def seed_of(config: Any) -> int:
    """``RunSpec.seed`` of MindFormers' configuration: without a seed it is 0."""
    return int(config.seed or 0)


def check_climbs(wrapper: nn.Cell, network: PortableLlamaForCausalLM) -> None:
    """Multipliers of masks climb in the train steps of ours.

    Raises:
        UserError: another step.
    """
    if network.pruning and not isinstance(wrapper, (PortableTrainOneStepCell, PortablePipelineStepCell)):
        raise UserError(
            f"{type(wrapper).__name__} lets the multipliers of masks descend: set runner_wrapper.use_clip_grad: True, "
            f"and leave {', '.join(LEFT_OUT)} out"
        )


def fill_base(network: PortableLlamaForCausalLM, base: str | None, seed: int) -> None:
    """Weights below adapters: from ``base``, or the first ones of ``seed``; a checkpoint holds the adapters alone."""
    if base:
        with closing(open_weights(Path(base), network.spec.model)) as weights:
            fill(network.causal_lm, weights.plan.run(weights.reader), optional=BESIDE_BASE)
    else:  # MindFormers has built this network without any
        ms.set_seed(seed)
        first = build_causal_lm(network.spec)
        first.init_parameters_data()
        drawn = ((item.name, item.asnumpy()) for item in first.get_parameters())
        fill(network.causal_lm, drawn, optional=BESIDE_BASE)
    logger.info("Weights below the adapters: %s", base or "the first ones of the seed")


def restore_step_state(cell: TrainStepCell, path: Path | None) -> None:
    """Load the train step's own parameters from ``path``; MindFormers loads network and optimizer only."""
    if path is None:
        return
    kind = path.suffix.removeprefix(".")
    wanted = (*STEP_STATE, PREFIX)
    held = ms.load_checkpoint(str(path), choice_func=lambda name: name.startswith(wanted), format=kind)
    cell.hook_state = {name: held[name].asnumpy() for name in held if name.startswith(PREFIX)}
    for name, parameter in step_state(cell).items():
        if name in held:
            parameter.set_data(ms.Tensor(held[name].asnumpy().reshape(parameter.shape), parameter.dtype))
    logger.info("Train step state restored: %s", {name: str(held[name].asnumpy()) for name in sorted(held)})


@contextmanager
def stand_ins() -> Iterator[None]:
    """For as long as it lasts, the YAML's callback names mean our classes."""
    callbacks = MindFormerRegister.registry[MindFormerModuleType.CALLBACK]
    before = {name: callbacks[name] for name in STAND_INS}
    try:
        for name, stand_in in STAND_INS.items():
            MindFormerRegister.register_cls(stand_in, MindFormerModuleType.CALLBACK, alias=name)
        yield
    finally:
        for name, original in before.items():
            MindFormerRegister.register_cls(original, MindFormerModuleType.CALLBACK, alias=name)
