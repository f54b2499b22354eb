# SPDX-License-Identifier: Apache-2.0
"""Converts weights between Hugging Face folders and MindSpore checkpoints of any layout, whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ext.core.byte_sizes import read_size
from mindformers_ext.core.config.hf import hf_notes, model_spec_from_hf
from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.atomic import flush, fresh_file, fresh_folder, refuse_existing
from mindformers_ext.formats.disk import check_space, free_bytes, refusal
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import CheckpointMeta, check_suffix, open_writer, sidecar
from mindformers_ext.formats.safetensors_dir import CONFIG, SafetensorsDirWriter
from mindformers_ext.formats.tensors import TensorReader
from mindformers_ext.jobs.checkpoint.companions import copy_companions, is_companion_folder
from mindformers_ext.jobs.checkpoint.copy_tensors import copy_tensors
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import check_model, describe_checkpoint, open_hf, open_ms, read_config
from mindformers_ext.weights.convert import plan_relayout, plan_to_hf, plan_to_mindspore
from mindformers_ext.weights.layouts import GMM, Layout
from mindformers_ext.weights.plan import Direction, Overflow, Plan

DEFAULT_SHARD = 5 * 10**9
NO_CONFIG = (
    "no config.json was written, as nothing told the model's: put the original one into the folder, or convert again "
    "with --config"
)
NO_TOKENIZER = (
    "no tokenizer was written: give the folder that holds it with --config, or copy its files (tokenizer.json, "
    "tokenizer.model, tokenizer_config.json, ...) into the new folder"
)


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to convert.

    ``model`` None takes the model that the configuration names; ``dtype`` None keeps each type. ``layout`` is that of
    the MindSpore checkpoint written, ``input_layout`` ("dense", "gmm") that of one read, where nothing else tells.
    ``strategy_dir`` belongs to the slices of many ranks. ``relayout`` goes from MindSpore to MindSpore.
    """

    input_path: Path
    output_path: Path
    direction: Direction = "to_ms"
    model: str | None = None
    dtype: str | None = None
    config: Path | None = None
    layout: Layout = field(default_factory=Layout)
    input_layout: str | None = None
    strategy_dir: Path | None = None
    max_shard_bytes: int = DEFAULT_SHARD
    overwrite: bool = False
    allow_overflow: bool = False
    refuse_gmm_twice: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What was written. ``ignored`` maps a reason to the source tensors that stayed behind."""

    tensors: int
    nbytes: int
    seconds: float
    ignored: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PlanReport:
    """What would be written: a line per tensor, the bytes, and the bytes that the disk has free."""

    lines: tuple[str, ...]
    nbytes: int
    free: int
    source: str
    target: str
    ignored: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """A conversion that is open and checked."""

    reader: TensorReader
    plan: Plan
    config: Mapping[str, Any]
    spec: ModelSpec
    source: str
    notes: tuple[str, ...]


def convert(request: ConvertRequest) -> ConvertReport:
    """Run the conversion.

    Raises:
        UserError: anything wrong with the input, the configuration or the output path; nothing is left half-written.
    """
    try:
        _check_output(request)
        with _opened(request) as job:
            check_space(request.output_path, job.plan.nbytes)
            started = time.monotonic()
            overflow = Overflow(request.allow_overflow)
            found = (_write_hf if request.direction == "to_hf" else _write_ms)(request, job, overflow)
            notes = (*job.notes, *_infinite(overflow), *((NO_CONFIG,) if _lacks_config(request, job) else ()), *found)
            return ConvertReport(
                len(job.plan.targets), job.plan.nbytes, time.monotonic() - started, _left_behind(job.plan), notes
            )
    except OSError as error:
        raise refusal(error, f"read '{request.input_path}' or to write '{request.output_path}'") from error


def plan_only(request: ConvertRequest) -> PlanReport:
    """All checks of ``convert`` and the plan, without writing; errors as there (but a full disk is no error)."""
    try:
        _check_output(request)
        with _opened(request) as job:
            return PlanReport(
                tuple(str(step) for step in job.plan.steps),
                job.plan.nbytes,
                free_bytes(request.output_path),
                job.source,
                "Hugging Face" if request.direction == "to_hf" else f"MindSpore, {request.layout}",
                _left_behind(job.plan),
                job.notes,
            )
    except OSError as error:
        raise refusal(error, f"read '{request.input_path}' or to write '{request.output_path}'") from error


def shard_bytes(text: str | None, reverse: bool) -> int:
    """``--max_shard_size`` in bytes. It cuts Hugging Face folders alone, so it is refused (``UserError``) elsewhere."""
    if text is None:
        return DEFAULT_SHARD
    if not reverse:
        raise UserError("--max_shard_size needs --reversed: a MindSpore checkpoint is one file")
    return read_size(text, "--max_shard_size", bare=True)


@contextmanager
def _opened(request: ConvertRequest) -> Iterator[_Job]:
    """Open the source and plan."""
    if request.direction == "to_ms":
        with closing(open_hf(request.input_path)) as reader:
            config = read_config(request.config or _folder(request.input_path))
            spec = model_spec_from_hf(config)
            check_model(spec, request.model)
            plan = plan_to_mindspore(reader, spec, request.dtype, request.layout)
            yield _Job(reader, plan, config, spec, "Hugging Face", (*notes_of(reader), *hf_notes(config)))
        return
    reader, meta = open_ms(request.input_path, request.strategy_dir)
    with closing(reader):
        known = describe_checkpoint(reader, meta, request.config, request.model, request.input_layout)
        if request.direction == "to_hf":
            plan = plan_to_hf(reader, known.spec, dtype=request.dtype, layout=known.layout)
        else:
            _check_relayout(request, known.layout, known.config)
            plan = plan_relayout(reader, known.spec, known.layout, request.layout, request.dtype)
        yield _Job(reader, plan, known.config, known.spec, f"MindSpore, {known.layout}", known.notes)


def _check_relayout(request: ConvertRequest, source: Layout, config: Mapping[str, Any]) -> None:
    same = source == request.layout
    nothing = same and request.dtype is None and request.input_path.suffix == request.output_path.suffix
    if nothing or (request.refuse_gmm_twice and source.experts == GMM == request.layout.experts):
        raise UserError(
            f"'{request.input_path}' already lies {source}: transposing it again would spoil it, and there is nothing "
            "else to do; use it as it is"
        )
    if request.layout.qkv_concat != source.qkv_concat and not config:
        raise UserError("joining or splitting q, k, v needs the number of heads: pass --config with a config.json")


def _check_output(request: ConvertRequest) -> None:
    out = request.output_path
    if request.direction == "to_hf":
        refuse_existing(out, request.overwrite)
        return _protect(request)
    check_suffix(out)
    refuse_existing(out, request.overwrite)
    beside = sidecar(out)
    if out.suffix == ".ckpt" and not (_is_leftover(out, beside)):
        refuse_existing(beside, request.overwrite)
    folder = _folder(request.input_path).resolve()
    if request.direction == "to_ms" and out.suffix == ".safetensors" and out.parent.resolve() == folder:
        raise UserError(f"output '{out}' lies among the weights of the input folder: choose another folder")
    if request.direction == "relayout" and out.resolve() == request.input_path.resolve():
        raise UserError(f"output '{out}' is the input: choose another name")


def _is_leftover(out: Path, beside: Path) -> bool:
    """A description of ours without its checkpoint: a run was killed between the two renames."""
    if out.exists() or not beside.is_file():
        return False
    try:
        return bool(CheckpointMeta.from_text(beside.read_text(encoding="utf-8"), str(beside)).hash)
    except (UserError, UnicodeDecodeError):
        return False


def _write_ms(request: ConvertRequest, job: _Job, overflow: Overflow) -> tuple[str, ...]:
    """The description of a ``.ckpt`` comes first: its fingerprint makes readers refuse an older file with it."""
    out = request.output_path
    experts = job.spec.moe.num_local_experts if job.spec.moe else 0
    told: dict[str, Any] = dict(
        config=job.config,
        dtype=_dtype_of(job.plan),
        source=str(request.input_path),
        layout=request.layout.experts,
        qkv_concat=request.layout.qkv_concat,
        experts=experts,
        source_hash=fingerprint(job.reader),
    )
    with fresh_file(out, request.overwrite) as partial:
        with open_writer(partial, out.suffix, job.plan.targets, CheckpointMeta(**told)) as writer:
            copy_tensors(job.plan, job.reader, writer, overflow)
        if out.suffix == ".ckpt":
            flush(partial)
            with closing(CkptFile(partial)) as written:
                meta = CheckpointMeta(**told, hash=fingerprint(written))
            with fresh_file(sidecar(out), overwrite=True) as description:
                description.write_text(meta.to_text(), encoding="utf-8")
    return ()


def _write_hf(request: ConvertRequest, job: _Job, overflow: Overflow) -> tuple[str, ...]:
    """Write the folder; returns notes."""
    with fresh_folder(request.output_path, request.overwrite) as partial:
        with SafetensorsDirWriter(partial, job.plan.targets, request.max_shard_bytes) as writer:
            copy_tensors(job.plan, job.reader, writer, overflow)
        if job.config:
            config = with_both_ropes(_with_dtype(job.config, _dtype_of(job.plan)))
            text = json.dumps(with_code(partial, config), indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
        if request.config is None or not request.config.is_dir():
            return (NO_TOKENIZER,)
        copied = copy_companions(request.config, partial)
        return copied.notes + (() if copied.has_tokenizer else (NO_TOKENIZER,))


def _folder(path: Path) -> Path:
    return path if path.is_dir() or not path.is_file() else path.parent


def _protect(request: ConvertRequest) -> None:
    """--overwrite replaces a whole folder: only a model folder, and none that this run reads from."""
    out = request.output_path.resolve()
    for source in (request.input_path, request.config, request.strategy_dir):
        if source and out in (source.resolve(), *source.resolve().parents):
            raise UserError(f"output '{request.output_path}' holds '{source}', which is read: choose another folder")
    if not request.overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file() or any(path.is_dir() and not is_companion_folder(path) for path in out.iterdir()):
        raise UserError(
            f"output '{request.output_path}' is not a plain model folder: remove it yourself or choose another"
        )


def _dtype_of(plan: Plan) -> str:
    kinds = {info.dtype for info in plan.targets}
    return BY_NUMPY[kinds.pop()].long if len(kinds) == 1 else "mixed"


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with the written type under the key it uses (``torch_dtype``, or ``dtype`` since transformers 5)."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype} if dtype != "mixed" else dict(config)


def _lacks_config(request: ConvertRequest, job: _Job) -> bool:
    return request.direction == "to_hf" and not job.config


def _infinite(overflow: Overflow) -> tuple[str, ...]:
    if not overflow.lost:
        return ()
    worst = ", ".join(f"'{name}' ({count})" for name, count in overflow.lost.most_common(5))
    return (f"{overflow.lost.total()} values became infinite in {len(overflow.lost)} tensors, most in {worst}",)


def _left_behind(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    ignored: dict[str, tuple[str, ...]] = {}
    for name, reason in plan.ignored:
        ignored[reason] = (*ignored.get(reason, ()), name)
    for name, original in plan.copies:
        ignored[f"same data as {original} (tied)"] = (name,)
    return ignored
