# SPDX-License-Identifier: Apache-2.0
"""What changes where a run is continued with another length or schedule: the learning rate on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.run import MINDRECORD, RunSpec
from mindformers_ext.core.config.schedule import Schedule, schedule_from_yaml
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.mindrecord_file import row_count
from mindformers_ext.jobs.checkpoint.saved import saved_as
from mindformers_ext.jobs.run.dataset import dataset_files
from mindformers_ext.jobs.run.keep import kept_config


def seam_notes(config: Mapping[str, Any], run: RunSpec, spec: NetworkSpec) -> list[str]:
    """A note where ``run`` continues one that had another schedule; nothing where the former one is not known."""
    former = kept_config(Path(run.output_dir), run.mode)
    saved = saved_as(Path(run.resume if isinstance(run.resume, str) else run.load or ""))
    if former is None or saved is None or run.data is None or run.data.loader != MINDRECORD:
        return []
    try:
        rows = sum(map(row_count, dataset_files(run.data)))
        per_epoch = min(rows, run.data.limit or rows) // update_rows(run, spec)
        (old, before), (new, now) = (_schedule(words, per_epoch) for words in (load_yaml(former), config))
    except (UserError, ArithmeticError):  # the run's own checks have told what is wrong, or will
        return []
    first = (saved.epoch - 1) * per_epoch + saved.step
    if old == new:
        return []
    return [
        f"the schedule has changed ({before} steps before, {now} now): after step {first} the learning rate goes from "
        f"{old.rate(max(0, first - 1)):.3g} to {new.rate(first):.3g}; --lr_schedule.total_steps {old.total_steps} "
        "keeps the former schedule"
    ]


def _schedule(config: Mapping[str, Any], per_epoch: int) -> tuple[Schedule, int]:
    problems = Problems("the schedule")
    steps = int(section_at(config, "runner_config").get("epochs") or 1) * per_epoch
    schedule = schedule_from_yaml(config, steps, per_epoch, problems)
    problems.raise_if_any()
    return schedule, steps


def update_rows(run: RunSpec, spec: NetworkSpec) -> int:
    """Rows of one update in MindFormers' loop, of all processes together; a pipeline's micro batches take the place of
    accumulation."""
    parallel = spec.parallel
    if parallel.parallel_mode in SHARDED_MODES:
        micro = parallel.micro_batch_num if parallel.pipeline_stage > 1 else run.accumulation
        return run.batch_size * parallel.data_parallel * parallel.micro_batch_interleave_num * micro
    return run.batch_size * run.accumulation * parallel.device_num
