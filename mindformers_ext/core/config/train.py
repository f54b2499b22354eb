# SPDX-License-Identifier: Apache-2.0
"""A training run of a MindFormers YAML as plain values, for an engine that has no MindFormers.

What such an engine cannot do is an error that names the key; nothing is left out silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.config.lora import LoraSpec, lora_from_yaml
from mindformers_ext.core.config.recompute import RecomputeSpec, recompute_asked
from mindformers_ext.core.config.run import MINDSPORE, PYTORCH
from mindformers_ext.core.config.schedule import Schedule, schedule_from_yaml
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.preferences import BETA, DPO_BETA, PAIR_COLUMNS, holds_pairs
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import ParallelSpec

OWN_LOOPS = {PYTORCH: "the PyTorch engine", MINDSPORE: "--trainer own"}  # by engine, as errors and notes call them
OPTIMIZERS = {"AdamW": True, "FusedAdamW": True, "FP32StateAdamWeightDecay": False}  # with bias correction?
CALLBACKS = ("MFLossMonitor", "CheckpointMonitor", "TopkBiasBalanceCallback", "MoEDropRateCallback", "ObsMonitor")
# Keys that would change the result, with the values that mean off.
OFF: dict[str, tuple[object, ...]] = {
    "runner_wrapper.local_norm": (False, None),
    "runner_wrapper.calculate_per_token_loss": (False, None),
    "runner_wrapper.use_skip_data_by_global_norm": (False, None),
    "optimizer.swap": (False, None),
    "grouped_lr_schedule": (None, [], {}),
    "swap_config.swap": (False, None),
    "layer_scale": (False, None),
    "lr_scale": (False, None),
    "do_eval": (False, None),
    "profile": (False, None),
    "parallel_config.pipeline_stage": (1, None),
    "parallel_config.model_parallel": (1, None),
    "parallel_config.context_parallel": (1, None),
    "runner_config.stop_step": (0, None),
    "remove_redundancy": (False, None),
    "only_save_strategy": (False, None),
    "use_graceful_exit": (False, None),
}
ADVICE = {
    "do_eval": "set it to False and evaluate after training (--run_mode eval)",
    "parallel_config.pipeline_stage": "set it to 1 and use data_parallel and expert_parallel",
    "parallel_config.model_parallel": "set it to 1 and use data_parallel and expert_parallel",
}
ON_MINDSPORE = "set it to 1, or use --trainer mindformers"
PARALLEL_SIZES = ("pipeline_stage", "model_parallel", "context_parallel")


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW (Loshchilov and Hutter 2019) or, without bias correction, ``FP32StateAdamWeightDecay`` (``ms.optim``).

    Weights of one dimension do not decay.
    """

    bias_correction: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Factor of the loss before its gradient is taken. ``window`` 0: fixed; else halved by ``factor`` at an overflow
    and multiplied by it after ``window`` steps without one (MindSpore's ``DynamicLossScaleUpdateCell``)."""

    value: float = 1.0
    factor: float = 2.0
    window: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointSchedule:
    """When checkpoints are written (every ``steps`` steps, 0 = at the end only) and how many stay."""

    prefix: str = "CKP"
    steps: int = 1
    keep: int = 5
    suffix: str = ".ckpt"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters whose name, MindFormers', ``pattern`` matches as a whole, and how they are trained.

    ``lr_factor`` multiplies the schedule's rate, ``sign`` -1 climbs the loss (multipliers of a Lagrangian), ``decay``
    None lets a parameter decay that has more than one dimension, and one that is not ``trained`` stays as it is.
    """

    pattern: str = ".*"
    lr_factor: float = 1.0
    sign: int = 1
    decay: bool | None = None
    trained: bool = True

    def __post_init__(self) -> None:
        re.compile(self.pattern)
        if self.sign not in (1, -1) or self.lr_factor < 0:
            raise UserError(
                f"parameters {self.pattern!r}: sign={self.sign} must be 1 or -1, lr_factor={self.lr_factor} 0 or more"
            )

    def decays(self, dimensions: int) -> bool:
        """Whether a parameter of so many dimensions decays."""
        return dimensions > 1 if self.decay is None else self.decay


def group_of(name: str, groups: tuple[ParameterGroup, ...]) -> ParameterGroup:
    """The first group that takes the parameter ``name``; one with default values where none does."""
    return next((group for group in groups if re.fullmatch(group.pattern, name)), DEFAULT_GROUP)


DEFAULT_GROUP = ParameterGroup()
# what scores experts stands below ``router`` (core/parameters.py); gates of shared experts choose nothing
FROZEN_GATES = ParameterGroup(pattern=r"(.*\.)?router\..*", trained=False)
GATES_ALONE = (replace(FROZEN_GATES, trained=True), ParameterGroup(trained=False))
FREEZE_GATE, TRAIN_GATE_ONLY = "runner_config.freeze_gate", "runner_config.train_gate_only"
GATE_SWITCHES: dict[str, tuple[ParameterGroup, ...]] = {FREEZE_GATE: (FROZEN_GATES,), TRAIN_GATE_ONLY: GATES_ALONE}


def trained_groups(config: Mapping[str, Any]) -> tuple[ParameterGroup, ...]:
    """What the run's switches say of its gates: they stay as they are, or they alone learn.

    Raises:
        UserError: both switches, or one that leaves nothing to train.
    """
    found = [switch for switch in GATE_SWITCHES if _value_at(config, switch) is True]
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} leave nothing to train: give one of them")
    if TRAIN_GATE_ONLY in found and lora_from_yaml(config):
        raise UserError(f"{TRAIN_GATE_ONLY}: True trains no adapters: leave it or pet_config out")
    return GATE_SWITCHES[found[0]] if found else ()


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How a network is trained: everything but the network and the data.

    ``recompute``: every layer computes its activations again; ``recomputed`` says it layer by layer, for an engine that
    can. ``pruning``: the network has masks. ``groups``: parameters that are trained in another way than the rest.
    ``dpo_beta``: rows are pairs of answers, and the loss is that of ``core.preferences``.
    """

    optimizer: OptimizerSpec
    schedule: Schedule
    steps: int
    max_grad_norm: float | None = None
    micro_batches: int = 1
    loss_scale: LossScale = LossScale()
    recompute: bool = False
    recomputed: RecomputeSpec | None = None
    seed: int = 0
    bias_rate: float = 0.0
    load_every: int = 0
    print_every: int = 1
    checkpoint: CheckpointSchedule | None = None
    lora: LoraSpec | None = None
    pruning: PruningSpec | None = None
    groups: tuple[ParameterGroup, ...] = ()
    dpo_beta: float | None = None


def train_spec_from_yaml(
    config: Mapping[str, Any], parallel: ParallelSpec, per_epoch: int, bias_rate: float, engine: str = PYTORCH
) -> tuple[TrainSpec, list[str]]:
    """The run that ``config`` describes, and notes about keys that have no effect here.

    Args:
        config: the YAML's content.
        parallel: its sizes, settled.
        per_epoch: steps of one pass over the data.
        bias_rate: ``moe_config.topk_bias_update_rate``, where the router has a bias.
        engine: which one trains.

    Raises:
        UserError: lists every key that asks for what is not built, and every value out of range.
    """
    problems = Problems("the configuration")
    notes: list[str] = []
    own = OWN_LOOPS[engine]
    _check_off(config, parallel, problems, own)
    if engine == MINDSPORE:
        _check_mindspore(config, parallel, problems, notes)
    runner, wrapper = config.get("runner_config") or {}, config.get("runner_wrapper") or {}
    steps = int(runner.get("epochs") or 1) * per_epoch
    optimizer = _optimizer(config.get("optimizer") or {}, problems)
    schedule = schedule_from_yaml(config, steps, per_epoch, problems)
    callbacks = {str(item.get("type")): item for item in config.get("callbacks") or []}
    for name in callbacks:
        if name not in CALLBACKS:
            problems.add(
                f"callback {name} belongs to MindFormers' trainer, {own} has {', '.join(CALLBACKS)}", "remove it"
            )
    monitor = callbacks.get("MFLossMonitor") or {}
    if monitor.get("tensorboard", "MFLossMonitor" in callbacks):
        notes.append(f"{own} writes no TensorBoard events; python tools/plot_run.py draws its metrics")
    clips = bool(wrapper.get("use_clip_grad", False))
    recompute = engine == PYTORCH and _recompute(config.get("recompute_config"), problems, notes, own)
    if "TopkBiasBalanceCallback" in callbacks:
        bias_rate = float(callbacks["TopkBiasBalanceCallback"].get("topk_bias_update_rate") or bias_rate)
    elif bias_rate:
        notes.append("topk_bias_update_rate has no effect without the callback TopkBiasBalanceCallback")
        bias_rate = 0.0
    spec = TrainSpec(
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        max_grad_norm=float(wrapper.get("max_grad_norm") or 1.0) if clips else None,
        micro_batches=int(runner.get("gradient_accumulation_steps") or 1),
        loss_scale=_loss_scale(wrapper.get("scale_sense"), problems),
        recompute=recompute,
        seed=int(config.get("seed") or 0),
        bias_rate=bias_rate,
        load_every=_load_every(callbacks.get("MoEDropRateCallback")),
        print_every=int(monitor.get("per_print_times") or 1),
        checkpoint=_checkpoint(callbacks.get("CheckpointMonitor"), problems, notes, own),
        lora=lora_from_yaml(config),
        groups=trained_groups(config),
        dpo_beta=_dpo_beta(config, problems),
    )
    problems.raise_if_any()
    return spec, notes


def _dpo_beta(config: Mapping[str, Any], problems: Problems) -> float | None:
    """The factor of the margin where rows are pairs of answers."""
    beta = _value_at(config, DPO_BETA)
    if holds_pairs(section_at(config, "train_dataset").get("input_columns") or ()):
        return float(BETA if beta is None else beta)
    if beta is not None:
        problems.add(
            f"{DPO_BETA}={beta}: rows are not pairs of answers",
            f"set train_dataset.input_columns to {list(PAIR_COLUMNS)}, or leave the key out",
        )
    return None


def _value_at(config: Mapping[str, Any], path: str) -> Any:
    """The value of a dotted key, None where a section is missing."""
    section, _, name = path.rpartition(".")
    return section_at(config, section).get(name)


def _load_every(words: Mapping[str, Any] | None) -> int:
    """Steps between the lines that show the experts' load, 0 for none."""
    return 0 if words is None else max(1, int(words.get("per_print_times") or 1))


def _check_mindspore(config: Mapping[str, Any], parallel: ParallelSpec, problems: Problems, notes: list[str]) -> None:
    """Sizes that only MindFormers' road does on MindSpore."""
    if parallel.parallel_mode not in ("stand_alone", "data_parallel"):
        problems.add(
            f"parallel.parallel_mode={parallel.parallel_mode}: --trainer own trains on MindSpore on one device or in "
            "data parallel",
            "set it to 0 (data_parallel) and full_batch to False, or use --trainer mindformers",
        )
    if parallel.expert_parallel > 1:
        problems.add(
            f"parallel_config.expert_parallel={parallel.expert_parallel}: --trainer own keeps all experts on every "
            "MindSpore device",
            ON_MINDSPORE,
        )
    if (config.get("parallel") or {}).get("enable_parallel_optimizer") and parallel.parallel_mode != "stand_alone":
        notes.append("enable_parallel_optimizer: --trainer own keeps whole optimizer states on every MindSpore device")


def _check_off(config: Mapping[str, Any], parallel: ParallelSpec, problems: Problems, own: str) -> None:
    for path, off in OFF.items():
        name = path.rpartition(".")[2]
        value = getattr(parallel, name) if name in PARALLEL_SIZES else _value_at(config, path)
        if value not in off:
            advice = ADVICE.get(path, f"set it to {off[0]}")
            if name in PARALLEL_SIZES and own == OWN_LOOPS[MINDSPORE]:
                advice = ON_MINDSPORE
            problems.add(f"{path}={value!r}: {own} does not build this", advice)


def _optimizer(words: Mapping[str, Any], problems: Problems) -> OptimizerSpec:
    kind = words.get("type")
    problems.one_of("optimizer.type", kind, tuple(OPTIMIZERS))
    corrected = OPTIMIZERS.get(str(kind), True)
    if corrected:
        betas = tuple(words.get("betas") or (0.9, 0.999))
    else:
        betas = (words.get("beta1", 0.9), words.get("beta2", 0.999))
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        problems.add(f"optimizer betas {list(betas)} are out of range", "give two numbers from 0 to below 1")
        betas = (0.9, 0.999)
    eps = float(words.get("eps", 1e-8 if corrected else 1e-6))
    if not eps > 0.0:
        problems.add(f"optimizer.eps={eps} is out of range", "use a value above 0")
    return OptimizerSpec(
        bias_correction=corrected,
        betas=(float(betas[0]), float(betas[1])),
        eps=eps,
        weight_decay=float(words.get("weight_decay") or 0.0),
    )


def _loss_scale(words: Any, problems: Problems) -> LossScale:
    if words is None:
        return LossScale()
    if isinstance(words, (int, float)):
        return LossScale(value=float(words))
    kinds = ("DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell")
    problems.one_of("runner_wrapper.scale_sense.type", words.get("type"), kinds)
    value = float(words.get("loss_scale_value") or 1.0)
    if words.get("type") != kinds[0]:
        return LossScale(value=value)
    return LossScale(
        value=value, factor=float(words.get("scale_factor") or 2.0), window=int(words.get("scale_window") or 1000)
    )


def _recompute(words: Any, problems: Problems, notes: list[str], own: str) -> bool:
    """Whole layers are computed again, or none."""
    whole, parts = recompute_asked(words, problems)
    if parts:
        notes.append(f"recompute_config.select_recompute: {own} recomputes whole layers")
    asked = words.get("recompute") if isinstance(words, Mapping) else words
    if whole and asked is not True:
        notes.append(f"recompute_config.recompute={asked}: {own} recomputes every layer")
    return whole or parts


def _checkpoint(
    words: Mapping[str, Any] | None, problems: Problems, notes: list[str], own: str
) -> CheckpointSchedule | None:
    if words is None:
        return None
    for name in ("save_checkpoint_seconds", "keep_checkpoint_per_n_minutes"):
        if words.get(name):
            problems.add(
                f"CheckpointMonitor.{name}={words[name]}: {own} counts steps",
                "use save_checkpoint_steps and keep_checkpoint_max",
            )
    if words.get("async_save"):
        notes.append(f"async_save: {own} writes a checkpoint before the next step")
    form = words.get("checkpoint_format") or "ckpt"
    problems.one_of("CheckpointMonitor.checkpoint_format", form, ("ckpt", "safetensors"))
    return CheckpointSchedule(
        prefix=str(words.get("prefix") or "CKP"),
        steps=int(words.get("save_checkpoint_steps", 1)),
        keep=int(words.get("keep_checkpoint_max", 5)),
        suffix=f".{form}",
    )
