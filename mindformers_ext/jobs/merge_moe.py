# SPDX-License-Identifier: Apache-2.0
"""Assembles a Mixtral from dense models: attention and norms of the base, the feed-forward part of each expert."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.dtypes import BY_NUMPY, cast
from mindformers_ext.formats.tensors import Array, TensorInfo
from mindformers_ext.jobs.merge_gates import gate_rows
from mindformers_ext.jobs.merge_models import Model, find_model, opened
from mindformers_ext.jobs.merge_moe_config import MoEConfig, read_moe_config
from mindformers_ext.jobs.merge_moe_plan import CopyFrom, Gate, Target, mixtral_config, plan_targets
from mindformers_ext.jobs.merge_output import (
    MergeReport,
    OutputRequest,
    chain_mindspore,
    check_output,
    check_result,
    check_space,
    free_bytes,
    refused,
    write_weights,
)
from mindformers_ext.jobs.merge_plan import Part, parameters_of
from mindformers_ext.jobs.merge_sidecars import copy_tokenizer, model_card, write_json
from mindformers_ext.jobs.merge_stream import COPIED, Findings, row_blocks
from mindformers_ext.jobs.weight_source import CONFIG

CONFIG_COPY = "mergekit_moe_config.yml"


@dataclass(frozen=True, kw_only=True)
class MoERequest:
    """An assembly. ``fused`` stores the experts of a layer as two tensors (transformers 5)."""

    config: Path
    output: OutputRequest
    fused: bool = False
    gate_scale: float | None = None
    untrained_is_fine: bool = False
    seed: int = 0
    strict: bool = False
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class _Job:
    """An assembly that is open and checked."""

    config: MoEConfig
    models: Mapping[str, Model]
    targets: list[Target]
    result: Mapping[str, Any]
    notes: list[str]


def assemble(request: MoERequest) -> MergeReport:
    """Run the assembly.

    Raises:
        UserError: anything wrong with the configuration, the models or the output path; nothing is left half-written.
    """
    out = request.output
    try:
        with _opened(request) as job:
            infos = [target.info for target in job.targets]
            check_space(out.folder, sum(info.nbytes for info in infos))
            started = time.monotonic()
            rows, notes = gate_rows(job.config, job.models[job.config.base_model], request.seed)
            if request.gate_scale is not None:
                rows = rows * np.float32(request.gate_scale)
            findings = Findings(request.strict)
            blocks = _maker(job, rows, request.seed, findings)
            with fresh_folder(out.folder, out.overwrite) as partial:
                write_weights(partial, infos, out.shard_bytes, out.quiet, blocks)
                notes += _write_beside(partial, out, job)
            notes += [*findings.notes(), *chain_mindspore(out)]
            return _report(job, out, time.monotonic() - started, notes)
    except OSError as error:
        raise refused(out.folder, error) from error


def plan_only(request: MoERequest) -> MergeReport:
    """All checks of ``assemble`` and the plan, without writing; errors as there (but a full disk is no error)."""
    try:
        with _opened(request) as job:
            return _report(job, request.output, None, [])
    except OSError as error:
        raise refused(request.output.folder, error) from error


@contextmanager
def _opened(request: MoERequest) -> Iterator[_Job]:
    config = read_moe_config(request.config, request.untrained_is_fine)
    if request.device != "cpu":
        raise UserError(f"device '{request.device}': assembling only copies, it runs on the processor")
    if request.gate_scale is not None and not abs(request.gate_scale) < float("inf"):
        raise UserError(f"--gate-scale {request.gate_scale}: give a finite number")
    names = config.models()
    check_output(request.output, [request.config, *map(find_model, names)])
    with opened(names) as models:
        problems = Problems("the mixture cannot be assembled")
        targets, notes = plan_targets(config, models, request.fused, problems)
        problems.raise_if_any()
        base = models[config.base_model]
        result = mixtral_config(base.config, len(config.experts), config.experts_per_token,
                                dtype=_common_type(targets), tied=_tied(targets))  # fmt: skip
        check_result(request.output, result)
        yield _Job(config, models, targets, result, notes)


def _common_type(targets: list[Target]) -> str:
    return BY_NUMPY[targets[0].info.dtype].long


def _tied(targets: list[Target]) -> bool:
    return all(target.info.name != "lm_head.weight" for target in targets)


def _maker(job: _Job, rows: np.ndarray, seed: int, findings: Findings) -> Callable[[int], Iterator[Array]]:
    """The blocks of each target."""

    def blocks(place: int) -> Iterator[Array]:
        target = job.targets[place]
        for source in target.sources:
            if isinstance(source, Gate):
                yield cast(rows[source.layer], target.info.dtype)[0]
            else:
                yield from _copied(job, source, target.info, seed, findings)

    return blocks


def _copied(job: _Job, source: CopyFrom, info: TensorInfo, seed: int, findings: Findings) -> Iterator[Array]:
    """The blocks of a matrix, with the expert's noise and scale, in the type of ``info``."""
    reader = job.models[source.model].reader
    random = np.random.Generator(np.random.Philox(key=[seed, source.stream])) if source.noise else None
    for index, _ in row_blocks(reader.infos[source.name].shape, COPIED):
        array = reader.read(source.name, index)
        findings.look(array, Part(source.model, source.name))
        if random is not None or source.scale != 1.0:
            wide = array.astype(np.float32)
            if random is not None:
                wide += random.standard_normal(wide.shape, dtype=np.float32) * np.float32(source.noise)
            wide *= np.float32(source.scale)
            array = wide
        array, lost = cast(array, info.dtype)
        if lost:
            findings.overflown[info.name] = findings.overflown.get(info.name, 0) + lost
        yield array


def _write_beside(folder: Path, out: OutputRequest, job: _Job) -> list[str]:
    notes = []
    base = job.models[job.config.base_model]
    write_json(folder / CONFIG, job.result)
    if out.copy_tokenizer and not copy_tokenizer(base.folder, folder):
        notes.append(f"'{base.name}' has no tokenizer files to copy")
    if out.model_card:
        method = f"mixture of experts, gate mode {job.config.gate_mode}"
        card = model_card(out.folder.name, method, list(job.models), base.name, job.config.text)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / CONFIG_COPY).write_text(job.config.text, encoding="utf-8")
    return notes


def _report(job: _Job, out: OutputRequest, seconds: float | None, notes: list[str]) -> MergeReport:
    infos = [target.info for target in job.targets]
    lines = tuple(f"{t.info.name} {BY_NUMPY[t.info.dtype].long} {list(t.info.shape)} = {_origin(job, t)}"
                  for t in job.targets)  # fmt: skip
    nbytes = sum(info.nbytes for info in infos)
    return MergeReport(len(infos), parameters_of(infos), nbytes, free_bytes(out.folder), seconds, lines,
                       (*job.notes, *notes))  # fmt: skip


def _origin(job: _Job, target: Target) -> str:
    first, count = target.sources[0], len(target.sources)
    if isinstance(first, Gate):
        return f"gate, {job.config.gate_mode}"
    more = f" and {count - 1} more" if count > 1 else ""
    return f"copy of {first.model}:{first.name}{more}"
