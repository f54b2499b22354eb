# SPDX-License-Identifier: Apache-2.0
"""Merges dense models into one, tensor by tensor, as a YAML says it: plan, stream, write whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.jobs.merge_config import MergeConfig, need_slices, read_merge_config
from mindformers_ext.jobs.merge_models import Model, find_model, opened
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
from mindformers_ext.jobs.merge_plan import HEAD, Plan, Task, make_plan, parameters_of
from mindformers_ext.jobs.merge_sidecars import (
    check_vocabularies,
    chosen_template,
    copy_tokenizer,
    merged_config,
    model_card,
    write_json,
    write_template,
)
from mindformers_ext.jobs.merge_stream import Findings, Runner
from mindformers_ext.jobs.weight_source import CONFIG
from mindformers_ext.surgery.merge.settings import Method

CARD, CONFIG_COPY = "README.md", "mergekit_config.yml"


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """A dense merge. ``threads`` None leaves it to torch."""

    config: Path
    output: OutputRequest
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    strict: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class _Job:
    """A merge that is open and checked."""

    config: MergeConfig
    method: Method
    models: Mapping[str, Model]
    plan: Plan
    donor: Model
    result: Mapping[str, Any]
    notes: list[str]


def merge(request: MergeRequest) -> MergeReport:
    """Run the merge.

    Raises:
        UserError: anything wrong with the configuration, the models or the output path; nothing is left half-written.
    """
    out = request.output
    try:
        with _opened(request) as job:
            check_space(out.folder, sum(info.nbytes for info in job.plan.infos))
            started = time.monotonic()
            findings = Findings(request.strict)
            readers = {name: model.reader for name, model in job.models.items()}
            runner = Runner(job.method, readers, request.device, findings)
            tasks = job.plan.tasks
            with fresh_folder(out.folder, out.overwrite) as partial:
                write_weights(
                    partial, job.plan.infos, out.shard_bytes, out.quiet, lambda place: runner.blocks(tasks[place])
                )
                job.notes.extend(_write_beside(partial, request, job))
            return _report(job, out, time.monotonic() - started, [*findings.notes(), *chain_mindspore(out)])
    except OSError as error:
        raise refused(out.folder, error) from error


def plan_only(request: MergeRequest) -> MergeReport:
    """All checks of ``merge`` and the plan, without writing; errors as there (but a full disk is no error)."""
    try:
        with _opened(request) as job:
            return _report(job, request.output, None, [])
    except OSError as error:
        raise refused(request.output.folder, error) from error


@contextmanager
def _opened(request: MergeRequest) -> Iterator[_Job]:
    config = read_merge_config(request.config)
    need_slices(config)
    method = _method(config)
    names = config.models()
    check_output(request.output, [request.config, *map(find_model, names)])
    with opened(names) as models:
        plan = make_plan(config, method, models, allow_crimes=request.allow_crimes,
                         truncate=request.truncate_embeddings, seed=request.seed, strict=request.strict)  # fmt: skip
        if any(not task.copied for task in plan.tasks):
            _prepare_torch(request)
        donor = models[config.base_model or names[0]]
        result = _config(config, plan, models, donor)
        check_result(request.output, result)
        tokens = _tokenizer_model(config, models, donor)
        notes = [*config.warnings, *plan.notes]
        if request.truncate_embeddings and plan.vocab:
            notes.append(f"embeddings were cut to {plan.vocab} tokens; the tokenizer may know more")
        yield _Job(config, method, models, plan, tokens, result, notes)


def _method(config: MergeConfig) -> Method:
    """The merge method; stacking layers needs no torch unless a tensor is scaled."""
    if config.merge_method == "passthrough":
        from mindformers_ext.surgery.merge.passthrough import PASSTHROUGH

        return PASSTHROUGH
    from mindformers_ext.surgery.merge.registry import method_called

    return method_called(config.merge_method)


def _prepare_torch(request: MergeRequest) -> None:
    from mindformers_ext.surgery.merge.bridge import device_fault, use_threads

    fault = device_fault(request.device)
    if fault:
        raise UserError(f"device '{request.device}' cannot be used: {fault}; leave --device and --cuda out to merge on "
                        "the processor")  # fmt: skip
    if request.threads:
        use_threads(request.threads)


def _tokenizer_model(config: MergeConfig, models: Mapping[str, Model], donor: Model) -> Model:
    """The model whose tokenizer and chat template are copied."""
    wanted = config.tokenizer
    if wanted is None:
        return donor
    named = donor if wanted in ("base", "union") else models.get(wanted)
    if named is None:
        raise UserError(f"tokenizer source '{wanted}' is none of the models: choose base, union or "
                        + ", ".join(models))  # fmt: skip
    check_vocabularies(wanted, {named.name: named.folder, **{m.name: m.folder for m in models.values()}})
    return named


def _config(config: MergeConfig, plan: Plan, models: Mapping[str, Model], donor: Model) -> dict[str, Any]:
    kinds = {task.info.dtype for task in plan.tasks}
    written = any(task.info.name == HEAD for task in plan.tasks)
    layer_types = []
    for name, layer in plan.layer_sources:
        own = models[name].config.get("layer_types")
        layer_types.append(own[layer] if isinstance(own, list) and layer < len(own) else "full_attention")
    return merged_config(
        donor.config, layers=plan.layers, layer_types=layer_types, vocab=plan.vocab, tied=not written,
        dtype=BY_NUMPY[kinds.pop()].long if len(kinds) == 1 else config.out_dtype or config.dtype or "float32",
    )  # fmt: skip


def _write_beside(folder: Path, request: MergeRequest, job: _Job) -> list[str]:
    notes = []
    write_json(folder / CONFIG, job.result)
    if request.output.copy_tokenizer and not copy_tokenizer(job.donor.folder, folder):
        notes.append(f"'{job.donor.name}' has no tokenizer files to copy")
    if job.config.chat_template:
        template = chosen_template(job.config.chat_template, [model.folder for model in job.models.values()])
        if template:
            write_template(folder, template)
        else:
            notes.append("chat_template auto: none of the models has a chat template")
    if request.output.model_card:
        card = model_card(request.output.folder.name, job.config.merge_method, list(job.models), job.config.base_model,
                          job.config.text)  # fmt: skip
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / CONFIG_COPY).write_text(job.config.text, encoding="utf-8")
    return notes


def _report(job: _Job, out: OutputRequest, seconds: float | None, notes: list[str]) -> MergeReport:
    infos = job.plan.infos
    return MergeReport(
        len(infos), parameters_of(infos), sum(info.nbytes for info in infos), free_bytes(out.folder), seconds,
        tuple(_line(job.method, task) for task in job.plan.tasks), (*job.notes, *notes),
    )  # fmt: skip


def _line(method: Method, task: Task) -> str:
    """One tensor of the plan: what comes out and what goes in."""
    kind = BY_NUMPY[task.info.dtype].long
    names = ", ".join(f"{part.model}:{part.name}" for part in (*([task.base] if task.base else []), *task.inputs))
    shared = {name: value for name, value in task.settings.shared.items() if not isinstance(value, bool)}
    each = [dict(values) for values in task.settings.inputs if values]
    words = " ".join(f"{key}={value:.6g}" for key, value in shared.items())
    words += "".join(" (" + " ".join(f"{key}={value:.6g}" for key, value in values.items()) + ")" for values in each)
    how = "copy" if task.copied else method.name
    return f"{task.info.name} {kind} {list(task.info.shape)} = {how} {words.strip()} of {names}".replace("  ", " ")
