# SPDX-License-Identifier: Apache-2.0
"""A cluster's job compiled on one machine: what is checked first, which ranks are compiled, where everything goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.capacity import rows_at_once
from mindformers_ext.core.cluster.build import built_pruning
from mindformers_ext.core.cluster.cluster_rules import TOGETHER, effective_spec
from mindformers_ext.core.cluster.judged import judge_network, read_network
from mindformers_ext.core.cluster.memory import StageMemory, prediction_memory, stage_memory
from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.core.config.run import (
    ASCEND,
    MINDFORMERS,
    MINDSPORE,
    TRAINER_KEY,
    TRAINING,
    device_target,
    run_spec_from_yaml,
)
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.dryrun.memory import (
    check_memory,
    check_prediction_memory,
    load_notes,
    memory_limit,
    step_settings,
)
from mindformers_ext.jobs.dryrun.predict import check_prediction, prediction_shape
from mindformers_ext.jobs.predict.generate import Shape
from mindformers_ext.jobs.predict.network import dropless_spec
from mindformers_ext.jobs.run.sections import check_sections

PREDICT = "predict"
# What a level-0 simulation cannot tell; every report says it.
LIMITS = (
    "This is a compilation, nothing was computed. It does not show the speed of kernels or links, real memory peaks, "
    "numerics, or whether CANN has a kernel for every operator and shape.",
    "Weights, gradients and optimizer states are exact (from the compiled graph); activation memory is estimated by "
    "arithmetic.",
    "Collectives are those of the graph; CANN may still fuse or split them. Bytes sent assume ring algorithms.",
)


@dataclass(frozen=True)
class DryRunPlan:
    """A job that can be compiled: its checked configuration, the spec that is really built, and the ranks asked for.

    ``shape``: of a prediction's graphs. ``limit``: bytes of a device's memory, where something says it.
    """

    config: dict[str, Any]
    spec: NetworkSpec
    world: int
    ranks: tuple[int, ...]
    notes: tuple[str, ...]
    memory: tuple[StageMemory, ...] = ()
    shape: Shape | None = None
    limit: int | None = None

    @property
    def one_run(self) -> str:
        """What runs a compiled graph once, in words: collectives are counted for it."""
        if self.shape is None:
            return "one step"
        group = rows_at_once(self.shape.rows, self.shape.length)
        return (
            f"one pass of each graph (prompt: {group} x {self.shape.length} tokens; token: one for each of "
            f"{_texts(self.shape.rows)})"
        )

    @property
    def work(self) -> str:
        """What the job does at a time, in words."""
        if self.shape is None:
            return f"{self.rows} rows of {self.spec.seq_length} tokens per step"
        return (
            f"{_texts(self.shape.rows)} at a time, prompts of up to {self.shape.length} tokens, "
            f"{self.shape.positions} with their answers"
        )

    @property
    def per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.spec.parallel.pipeline_stage

    @property
    def rows(self) -> int:
        """Rows of one step, as every rank reads them."""
        if self.shape is not None:
            return self.shape.rows
        parallel, runner = self.spec.parallel, self.config.get("runner_config") or {}
        copies = parallel.data_parallel if parallel.full_batch else 1
        steps = int(runner.get("gradient_accumulation_steps") or 1)
        return self.spec.batch_size * copies * parallel.micro_batch_num * parallel.micro_batch_interleave_num * steps

    def stage(self, rank: int) -> int:
        """The pipeline stage of ``rank``."""
        return rank // self.per_stage


def _texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count} texts"


def plan_dry_run(
    config: Mapping[str, Any], where: str, world: int, ranks: str, out: Path, memory: str | None = None
) -> DryRunPlan:
    """Check ``config`` (from the file ``where``) for ``world`` devices and settle what is compiled.

    Args:
        config: the YAML's content with options applied.
        where: the file, for messages.
        world: devices of the whole job.
        ranks: "all", "stages" (the first rank of each pipeline stage), or numbers such as "0,8".
        out: the job's output folder.
        memory: of one device, such as "64GB"; a job that needs more is refused.

    Raises:
        UserError: lists every broken rule with the nearest valid choice.
    """
    if world < 1:
        raise UserError(f"--worker_num {world}: give the number of devices of the whole job, 1 or more")
    words = {**with_mixture_words(config), "output_dir": str(out)}
    mode = words.get("run_mode")
    if mode not in (*TRAINING, PREDICT):
        raise UserError(
            f"{where}: run_mode={mode!r}: a dry run compiles the training step or the graphs of a "
            "prediction, choose train, finetune or predict (--run_mode train)"
        )
    notes = _adapt(words, world)
    try:
        run = run_spec_from_yaml(words)
        notes += check_sections(words, mode)
        spec, found = read_network(words, run, world)
        if mode == PREDICT:
            notes += check_prediction(run, spec)
        notes += [*found, *judge_network(spec, run, TOGETHER if mode == PREDICT and world > 1 else mode)]
        spec = effective_spec(spec)[0]
        if run.family is not None:
            built_pruning(words, spec)
        asked = asked_ranks(ranks, world, spec.parallel.pipeline_stage)
        shape = prediction_shape(run, spec) if mode == PREDICT else None
        limits = memory, section_at(words, "context").get("max_device_memory")
        if shape is None:
            settings = step_settings(words, spec, run.family is not None)
            notes += [*check_memory(spec, settings, *limits), *load_notes(spec, settings)]
            stages = stage_memory(spec, settings)
        else:
            spec = dropless_spec(spec, run.device, spec.seq_length)
            notes += check_prediction_memory(spec, world, shape, *limits)
            stages = (prediction_memory(spec, world, shape.rows, shape.length, shape.positions),)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return DryRunPlan(words, spec, world, asked, tuple(notes), stages, shape, memory_limit(*limits))


def _adapt(words: dict[str, Any], world: int) -> list[str]:
    """Change what a compilation for ``world`` devices needs; returns one line per change."""
    notes = []
    if bool(words.get("use_parallel")) != (world > 1):
        words["use_parallel"] = world > 1
        notes.append(f"use_parallel becomes {world > 1}: --worker_num {world}")
    context = dict(words.get("context") or {})
    if device_target(words) != ASCEND:
        notes.append(f"context.device_target {context['device_target']} becomes Ascend")
    if context.get("mode", 0) not in (0, "GRAPH_MODE"):
        raise UserError("context.mode is 1 (pynative): only graph mode is compiled, set --mode 0")
    # the YAML's save_graphs would win over the variable that asks for the two graphs read here
    context = {key: value for key, value in context.items() if key not in ("save_graphs", "save_graphs_path")}
    words["context"] = {**context, "device_target": ASCEND, "device_id": 0}
    for key, kept in (("engine", MINDSPORE), (TRAINER_KEY, MINDFORMERS)):
        if words.pop(key, None) not in (None, kept):
            notes.append(f"{key} becomes {kept}, whose road is compiled")
    for key, off in (
        ("load_checkpoint", ""),
        ("resume_training", False),
        ("auto_trans_ckpt", False),
        ("do_eval", False),
        ("profile", False),
    ):
        if words.get(key):
            notes.append(f"{key} is left out: nothing is loaded or run")
            words[key] = off
    return notes


def asked_ranks(text: str, world: int, stages: int) -> tuple[int, ...]:
    """The ranks that ``all``, ``stages`` or a list of numbers means.

    Raises:
        UserError: a number outside 0 to ``world`` - 1, or no number.
    """
    if text == "all":
        return tuple(range(world))
    if text == "stages":
        return tuple(range(0, world, world // stages))
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--ranks {text!r}: write all, stages, or numbers such as 0,8")
    ranks = sorted({int(part) for part in parts})
    if ranks[-1] >= world:
        raise UserError(f"--ranks {text}: the job has the ranks 0 to {world - 1} (--worker_num {world})")
    return tuple(ranks)
