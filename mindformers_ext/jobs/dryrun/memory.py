# SPDX-License-Identifier: Apache-2.0
"""Whether a job fits its devices' memory: before anything is compiled. ``jobs.dryrun.suggest`` lists what would."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mindformers_ext.core.byte_sizes import read_size, size_text
from mindformers_ext.core.cluster.memory import (
    StepSettings,
    has_fixed_slots,
    prediction_memory,
    stage_memory,
    worst_load,
)
from mindformers_ext.core.cluster.placement import OPTIMIZER_THRESHOLD
from mindformers_ext.core.cluster.split_search import Split, fitting_splits
from mindformers_ext.core.config.foreign import foreign_lora
from mindformers_ext.core.config.lora import lora_from_yaml
from mindformers_ext.core.config.pruning import pruning_from_yaml
from mindformers_ext.core.config.recompute import WHERE, recompute_from_yaml
from mindformers_ext.core.config.train import trained_groups
from mindformers_ext.core.config.values import read_value, section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.generate import Shape


def step_settings(config: Mapping[str, Any], spec: NetworkSpec, ours: bool = True) -> StepSettings:
    """Recompute, the optimizer's cut and accumulation as ``config`` asks for them.

    ``ours``: whether the network is; of MindFormers' own, whole layers are counted alone.

    Raises:
        UserError: values of the wrong kind.
    """
    problems = Problems("the configuration")
    cut = ((config.get("parallel") or {}).get("parallel_optimizer_config")) or {}
    where = "parallel.parallel_optimizer_config"
    threshold = read_value(
        f"{where}.parallel_optimizer_threshold",
        cut.get("parallel_optimizer_threshold", OPTIMIZER_THRESHOLD),
        "int",
        OPTIMIZER_THRESHOLD,
        problems,
    )
    shard = read_value(
        f"{where}.gradient_accumulation_shard", cut.get("gradient_accumulation_shard", False), "bool", False, problems
    )
    steps = read_value(
        "runner_config.gradient_accumulation_steps",
        (config.get("runner_config") or {}).get("gradient_accumulation_steps") or 1,
        "int",
        1,
        problems,
    )
    problems.positive("runner_config.gradient_accumulation_steps", steps)
    problems.raise_if_any()
    if not ours:
        config = {**config, WHERE: {"recompute": section_at(config, WHERE).get("recompute")}}
    recompute = recompute_from_yaml(config, spec)
    lora = lora_from_yaml(config) if ours else foreign_lora(config)
    pruning = pruning_from_yaml(config, spec.model) if ours else None
    groups = trained_groups(config) if ours else ()
    return StepSettings(recompute, int(threshold), bool(shard), int(steps), lora, pruning, groups)


def memory_limit(memory: str | None, configured: object) -> int | None:
    """Bytes of a device: what the user says, else ``context.max_device_memory``, if that is written."""
    if memory is not None:
        return read_size(memory, "--memory")
    return None if configured is None else read_size(str(configured), "context.max_device_memory")


def check_memory(spec: NetworkSpec, settings: StepSettings, memory: str | None, configured: object) -> list[str]:
    """Refuse a job that needs more than ``memory``; notes where it needs more than ``configured``.

    Args:
        spec: as ``effective_spec`` leaves it.
        settings: of the step.
        memory: what the user says a device has.
        configured: ``context.max_device_memory`` of the YAML.

    Raises:
        UserError: the fullest stage with its parts, and the cheapest split that fits.
    """
    fullest = max(stage_memory(spec, settings), key=lambda stage: stage.total)
    need = (
        f"stage {fullest.stage} needs {size_text(fullest.total)} on each device: weights {size_text(fullest.weights)}, "
        f"gradients {size_text(fullest.gradients)}, optimizer {size_text(fullest.optimizer)}, activations about "
        f"{size_text(fullest.activations)}, gathered weights about {size_text(fullest.gathered)}"
    )
    return _judged(
        need,
        fullest.total,
        memory,
        configured,
        lambda limit: split_that_fits(spec, settings, limit),
        " (--suggest lists splits that fit)",
    )


def load_notes(spec: NetworkSpec, settings: StepSettings) -> list[str]:
    """A line that tells the range, where memory follows the load of experts: all else is counted at equal load."""
    if has_fixed_slots(spec):
        return []
    equal, worst = (max(stage.total for stage in stage_memory(each, settings)) for each in (spec, worst_load(spec)))
    return [
        f"memory follows the load of the experts: the fullest stage needs {size_text(equal)} at equal load, which is "
        f"counted here, and about {size_text(worst)} at the worst"
    ]


def check_prediction_memory(
    spec: NetworkSpec, count: int, shape: Shape, memory: str | None, configured: object
) -> list[str]:
    """The same for ``count`` devices that answer together; ``spec`` is dropless.

    Raises:
        UserError: what is needed, and the least number of devices that is enough.
    """
    sizes = (shape.rows, shape.length, shape.positions)
    here = prediction_memory(spec, count, *sizes)
    need = (
        f"each device needs {size_text(here.total)}: weights {size_text(here.weights)}, keys and values "
        f"{size_text(here.cache)}, activations about {size_text(here.activations)}"
    )

    def way_out(limit: int) -> str:
        model = spec.model
        most = math.gcd(*model.cut_widths.values())
        for more in range(count + 1, most + 1):
            if most % more == 0 and prediction_memory(spec, more, *sizes).total <= limit:
                return f"{more} devices with model_parallel {more} are enough"
        return f"no number of devices up to {most} is enough: answer fewer or shorter prompts at a time"

    return _judged(need, here.total, memory, configured, way_out, "")


def _judged(
    need: str, total: int, memory: str | None, configured: object, way_out: Callable[[int], str], more: str
) -> list[str]:
    """Refuse what needs more than ``memory``; a note where it needs more than ``configured``."""
    if memory is not None:
        limit = read_size(memory, "--memory")
        if total > limit:
            raise UserError(f"{need}; --memory is {memory}: {way_out(limit)}")
        return []
    if configured is not None and total > read_size(str(configured), "context.max_device_memory"):
        return [f"{need}; context.max_device_memory is {configured}{more}"]
    return []


def split_that_fits(spec: NetworkSpec, settings: StepSettings, limit: int) -> str:
    """The cheapest split that fits ``limit`` bytes of a device, or what else to do."""
    fitting = fitting_splits(spec, settings, limit)
    if fitting:
        return "the cheapest split that fits is " + split_words(fitting[0]) + of_every_layer(spec, settings)
    everything = fitting_splits(spec, settings)
    if not everything:
        return f"no split of {spec.parallel.device_num} devices keeps the rules and the rows of a step"
    least = min(split.memory.total for split in everything)
    more = "" if settings.recompute.layers else ", or set recompute_config.recompute: True"
    return (
        f"no split of {spec.parallel.device_num} devices fits (the least is {size_text(least)}): use more devices{more}"
    )


def of_every_layer(spec: NetworkSpec, settings: StepSettings) -> str:
    """What a split is counted with, where the configuration numbers layers per stage."""
    every = settings.recompute.for_every_layer(spec.model.num_hidden_layers)
    return "" if every == settings.recompute else ", with True for the numbers of layers in recompute_config"


def split_words(split: Split) -> str:
    """The sizes of a split in the YAML's words."""
    return ", ".join(f"{name}={value}" for name, value in split.words.items())
