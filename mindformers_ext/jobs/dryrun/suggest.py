# SPDX-License-Identifier: Apache-2.0
"""What ``--suggest`` prints: the splits of a job that fit, and for one of them how large its micro batches may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.byte_sizes import read_size, size_text
from mindformers_ext.core.cluster.batch_search import batch_front
from mindformers_ext.core.cluster.cluster_rules import effective_spec, uncut_slots
from mindformers_ext.core.cluster.judged import judge_network, read_network
from mindformers_ext.core.cluster.memory import StepSettings, stage_memory
from mindformers_ext.core.cluster.split_cost import ASSUMPTIONS
from mindformers_ext.core.cluster.split_search import MACHINE, Split, fitting_splits, step_rows
from mindformers_ext.core.config.mixture_words import with_mixture_words
from mindformers_ext.core.config.recompute import SELECTED
from mindformers_ext.core.config.run import RunSpec, run_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.dryrun.batch_table import Cut, aligned, batch_lines
from mindformers_ext.jobs.dryrun.memory import of_every_layer, split_that_fits, split_words, step_settings

SHOWN = 10  # splits in the list
NEEDED = (
    "weights, gradients and optimizer states follow from the slices; activations and gathered weights are "
    "estimated by arithmetic"
)


@dataclass(frozen=True)
class _Job:
    """A file's job on so many devices: the network as written, its run, and the step's settings."""

    spec: NetworkSpec
    run: RunSpec
    settings: StepSettings
    rows: int


def suggestions(config: Mapping[str, Any], where: str, world: int | None, memory: str | None, device: str) -> list[str]:
    """Lines for ``--suggest``: splits of the job in ``config`` that fit, cheapest first, and the micro batches and
    recompute of the file's own split, or of the first one where that one does not fit.

    Args:
        config: the YAML's content with options applied; its own split may be wrong.
        where: the file, for messages.
        world: devices of the whole job; None: as many as the file's split has.
        memory: of one device; None: ``context.max_device_memory``.
        device: its name, for an estimate of tokens a second (``core.cluster.throughput``).

    Raises:
        UserError: nothing says how much memory there is, the file is wrong elsewhere, or nothing fits.
    """
    if world is not None and world < 1:
        raise UserError(f"--worker_num {world}: give the number of devices of the whole job, 1 or more")
    limit_text = memory or (config.get("context") or {}).get("max_device_memory")
    if limit_text is None:
        raise UserError("--suggest needs the memory of one device: add --memory 64GB")
    limit = read_size(str(limit_text), "--memory" if memory else "context.max_device_memory")
    try:
        job = _read(with_mixture_words(config), world)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    splits, note = _splits(job, limit)
    own, verdict = _own_split(job, limit)
    cuts = [*own, *(Cut("the first split", split.spec, split.settings, is_own=False) for split in splits[:1])]
    fronts = ((cut, batch_front(cut.spec, cut.settings, limit, _parts(cut, job.run))) for cut in cuts)
    found = next((pair for pair in fronts if pair[1].points), None)
    if found is None:
        advice = f"{_advice(job, limit)}; a step of {job.rows} rows is kept, {limit_text} each"
        raise UserError(f"{where}: {advice}; {verdict}")
    head = (
        f"{where}: {job.spec.parallel.device_num} devices of {limit_text}, {job.rows} rows of {job.spec.seq_length} "
        f"tokens per step{note}"
    )
    listed = suggestion_lines(splits, head) if splits else [head, f"no split is listed: {_advice(job, limit)}"]
    return [*listed, verdict, "", *batch_lines(*found, job.rows, limit_text, device)]


def _splits(job: _Job, limit: int) -> tuple[list[Split], str]:
    """Those that fit as the file computes, else with all layers again; and which it is, for the list's head."""
    splits = fitting_splits(job.spec, job.settings, limit, job.rows)
    if splits:
        return splits, of_every_layer(job.spec, job.settings)
    splits = fitting_splits(job.spec, _all_again(job), limit, job.rows)
    return splits, ", with recompute: True, without which none fits" if splits else ""


def _all_again(job: _Job) -> StepSettings:
    layers = frozenset(range(job.spec.model.num_hidden_layers))
    return replace(job.settings, recompute=replace(job.settings.recompute, layers=layers))


def _advice(job: _Job, limit: int) -> str:
    """What to do where nothing fits, whatever is computed again."""
    parallel = replace(job.spec.parallel, parallel_mode="semi_auto_parallel")
    hindrance = uncut_slots(replace(job.spec, parallel=parallel))
    return ": ".join(hindrance) if hindrance else split_that_fits(job.spec, _all_again(job), limit)


def _read(config: Mapping[str, Any], world: int | None) -> _Job:
    run = run_spec_from_yaml({**config, "use_parallel": True})
    spec, _ = read_network({**config, "use_parallel": True}, run, world or 1)
    parallel = spec.parallel
    devices = world or parallel.data_parallel * parallel.model_parallel * parallel.pipeline_stage
    spec = replace(spec, parallel=replace(parallel, device_num=devices))
    settings = step_settings(config, effective_spec(spec)[0], run.family is not None)
    return _Job(spec, run, settings, step_rows(effective_spec(spec)[0], settings))


def _parts(cut: Cut, run: RunSpec) -> frozenset[str]:
    """What of a layer may be computed again by itself: what the file selects, else what ``select_recompute: True``
    means. MindFormers' own networks are counted in whole layers alone."""
    again, moe = cut.settings.recompute.for_every_layer(cut.spec.model.num_hidden_layers), cut.spec.model.moe
    if again.selected:
        return frozenset(part for part, _ in again.selected)
    return frozenset() if run.family is None or (moe and moe.use_gmm) else frozenset([SELECTED])


def _own_split(job: _Job, limit: int) -> tuple[list[Cut], str]:
    """The split in the file, unless a rule refuses it; and this, or whether it is too large, or how much it needs."""
    parallel = job.spec.parallel
    names = ("data_parallel", "model_parallel", "expert_parallel", "pipeline_stage", "use_seq_parallel")
    own = "the file's own split (" + ", ".join(f"{name}={getattr(parallel, name)}" for name in names) + ")"
    try:
        judge_network(job.spec, job.run, "train")
    except UserError as error:
        return [], f"{own} is refused: {error}"
    cut = Cut("the file's own split", effective_spec(job.spec)[0], job.settings, is_own=True)
    need = max(stage.total for stage in stage_memory(cut.spec, cut.settings))
    return [cut], f"{own} {'fits' if need <= limit else 'does not fit'}: it needs {size_text(need)}"


def suggestion_lines(splits: Sequence[Split], head: str) -> list[str]:
    """The table of splits and what its columns mean."""
    columns = ("dp", "mp", "ep", "pp", "micro", "accumulate", "memory GB", "sent GB", "bubble", "model s")
    rows: list[tuple[str, ...]] = [columns]
    for split in splits[:SHOWN]:
        words, cost = split.words, split.cost
        rows.append(
            (
                *(
                    f"{words[name]}"
                    for name in (
                        "data_parallel",
                        "model_parallel",
                        "expert_parallel",
                        "pipeline_stage",
                        "micro_batch_num",
                        "gradient_accumulation_steps",
                    )
                ),
                f"{split.memory.total / 1e9:.1f}",
                f"{cost.sent_total / 1e9:.1f}",
                f"{100 * cost.bubble:.0f}%",
                f"{cost.seconds:.1f}",
            )
        )
    best = splits[0]
    parts = ", ".join(f"{purpose} {size / 1e9:.1f} GB" for purpose, size in sorted(best.cost.sent.items()))
    return [
        head,
        f"{len(splits)} splits fit" + (f", the cheapest {SHOWN}:" if len(splits) > SHOWN else ":"),
        *aligned(rows),
        f"the first one: {split_words(best)}",
        f"  sends per step: {parts}",
        f"memory: the fullest stage; {NEEDED}.",
        f"order: {ASSUMPTIONS}. It puts splits in order and predicts no time.",
        f"model_parallel stays within a machine of {MACHINE} devices; above 1 it comes with use_seq_parallel.",
    ]
