# SPDX-License-Identifier: Apache-2.0
"""Merges dense models into one, tensor by tensor, as a YAML says it: plan, stream, write whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.merge.config import MergeConfig, need_slices, read_merge_config
from mindformers_ext.jobs.merge.course import Prepared, run_merge
from mindformers_ext.jobs.merge.fit import check_fit
from mindformers_ext.jobs.merge.models import Model, folders_of, opened
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, check_output, check_result
from mindformers_ext.jobs.merge.plan import MergePlan, TensorTask, make_plan
from mindformers_ext.jobs.merge.sidecars import Card, copy_tokenizer, merged_config, write_card, write_json
from mindformers_ext.jobs.merge.stream import Findings, TaskRunner
from mindformers_ext.jobs.merge.templates import chosen_template, write_template
from mindformers_ext.jobs.merge.tokenizer import Tokenizers, choose_tokenizer, write_tokenizer
from mindformers_ext.surgery.merge.architectures import EMBEDDING, FULL, HEAD
from mindformers_ext.surgery.merge.settings import Method

CONFIG_COPY = "mergekit_config.yml"
STACK = "passthrough"


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """A dense merge. ``adapted``: the type of tensors that an adapter touches, None for the model's."""

    config: Path
    output: OutputRequest
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    strict: bool = False
    allow_overflow: bool = False
    adapted: str | None = None
    seed: int = 0
    device: str = "cpu"


def merge(request: MergeRequest, write: bool = True) -> MergeReport:
    """Run the merge, or with ``write`` false only check everything and plan it (a full disk is no error then).

    Raises:
        UserError: anything wrong with the configuration, the models or the output path; nothing is left half-written.
    """
    return run_merge(request.output, _opened(request), Findings(request.strict, request.allow_overflow), write)


@contextmanager
def _opened(request: MergeRequest) -> Iterator[Prepared]:
    config = read_merge_config(request.config)
    need_slices(config)
    names = config.models()
    check_output(request.output, [request.config, *folders_of(names, request.output.download)])
    with opened(names, request.adapted) as models:
        base = models[config.base_model or names[0]]
        chosen = choose_tokenizer(config.tokenizer, models, base, config.base_model is not None)
        method = _method(config)  # the first that may load torch
        plan = make_plan(
            config,
            method,
            chosen.models,
            allow_crimes=request.allow_crimes,
            truncate=request.truncate_embeddings,
            seed=request.seed,
            strict=request.strict,
        )
        result = _config(config, plan, models, base, chosen)
        _check_model(plan, base, result)
        check_result(request.output, result)
        if any(not task.copied for task in plan.tasks):
            _prepare_torch(request)
        names_seen = (note for model in models.values() for note in model.notes)
        notes = [*config.warnings, *names_seen, *plan.notes, *chosen.notes]
        if plan.vocab:
            notes.append(f"embeddings were cut to {plan.vocab} tokens; the tokenizer may know more")
        elif not chosen.rows and result["vocab_size"] != base.config.get("vocab_size", result["vocab_size"]):
            notes.append(f"vocab_size is {result['vocab_size']}, the rows of the embedding, not that of '{base.name}'")
        yield _prepared(request, config, method, plan, chosen, result, notes)


def _prepared(
    request: MergeRequest,
    config: MergeConfig,
    method: Method,
    plan: MergePlan,
    chosen: Tokenizers,
    result: Mapping[str, Any],
    notes: list[str],
) -> Prepared:
    def runner(findings: Findings) -> TaskRunner:
        readers = {name: model.reader for name, model in chosen.models.items()}
        return TaskRunner(method, readers, request.device, findings)

    def start(findings: Findings, _: list[str]) -> Callable[[int], Iterator[Array]]:
        running = runner(findings)
        return lambda place: running.blocks(plan.tasks[place])

    def beside(folder: Path) -> list[str]:
        return _write_beside(folder, request.output, config, chosen, result)

    lines = tuple(_line(method, task) for task in plan.tasks)
    return Prepared(plan.infos, lines, notes, start, beside, lambda: (runner(Findings()), plan.tasks))


def _method(config: MergeConfig) -> Method:
    """The merge method; stacking layers needs no torch unless a tensor is scaled."""
    if config.merge_method == STACK:
        from mindformers_ext.surgery.merge.passthrough import PASSTHROUGH

        return PASSTHROUGH
    from mindformers_ext.surgery.merge.registry import method_called

    return method_called(config.merge_method)


def _prepare_torch(request: MergeRequest) -> None:
    from mindformers_ext.surgery.merge.bridge import device_fault, one_thread_each

    fault = device_fault(request.device)
    if fault:
        raise UserError(
            f"device '{request.device}' cannot be used: {fault}; leave --device and --cuda out to merge on "
            "the processor"
        )
    one_thread_each()


def _config(
    config: MergeConfig, plan: MergePlan, models: Mapping[str, Model], base: Model, chosen: Tokenizers
) -> dict[str, Any]:
    kinds = {task.info.dtype for task in plan.tasks}
    written = any(task.info.name == HEAD.name for task in plan.tasks)
    rows = [task.info.shape[0] for task in plan.tasks if task.info.name == EMBEDDING.name and task.info.shape]
    return merged_config(
        base.config,
        layers=plan.layers,
        layer_types=[_layer_type(models[name], layer) for name, layer in plan.layer_sources],
        vocab=rows[0] if rows else None,
        tied=not written,
        dtype=BY_NUMPY[kinds.pop()].long if len(kinds) == 1 else config.out_dtype or config.dtype or "float32",
        tokens=chosen.donor.config,
    )


def _layer_type(model: Model, layer: int) -> str:
    """The kind of attention of a model's layer."""
    own, turns = model.config.get("layer_types"), model.architecture.layer_types or (FULL,)
    return str(own[layer]) if isinstance(own, list) and layer < len(own) else turns[layer % len(turns)]


def _check_model(plan: MergePlan, base: Model, result: Mapping[str, Any]) -> None:
    """What is to be written must be a model of the sizes that its config.json says."""
    problems = Problems("the merge would be no model")
    shapes = {task.info.name: task.info.shape for task in plan.tasks}
    check_fit(shapes, base.architecture, result, f"the merge (written with that of '{base.name}')", problems)
    problems.raise_if_any()


def _write_beside(
    folder: Path, out: OutputRequest, config: MergeConfig, chosen: Tokenizers, result: Mapping[str, Any]
) -> list[str]:
    write_json(folder / CONFIG, with_code(folder, result))
    notes = []
    if out.copy_tokenizer:
        notes += copy_tokenizer(chosen.donor.name, chosen.donor.folder, folder)
        write_tokenizer(chosen, folder)
    if config.chat_template:
        template = chosen_template(config.chat_template, [model.folder for model in chosen.models.values()])
        if template:
            write_template(folder, template)
        else:
            notes.append("chat_template auto: none of the models has a chat template")
    if out.model_card:
        card = Card(config.merge_method, tuple(chosen.models), config.base_model, config.text, CONFIG_COPY)
        write_card(folder, out.folder.name, card)
    return notes


def _line(method: Method, task: TensorTask) -> str:
    """One tensor of the plan: what comes out and what goes in."""
    kind = BY_NUMPY[task.info.dtype].long
    names = ", ".join(f"{part.model}:{part.name}" for part in (*([task.base] if task.base else []), *task.inputs))
    shared = {name: value for name, value in task.settings.shared.items() if not isinstance(value, bool)}
    each = [dict(values) for values in task.settings.inputs if values]
    words = " ".join(f"{key}={value:.6g}" for key, value in shared.items())
    words += "".join(" (" + " ".join(f"{key}={value:.6g}" for key, value in values.items()) + ")" for values in each)
    how = "copy" if task.copied else method.name
    return f"{task.info.name} {kind} {list(task.info.shape)} = {how} {words.strip()} of {names}".replace("  ", " ")
