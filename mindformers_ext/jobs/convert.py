# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face folder to a MindSpore checkpoint and back, one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.hf_config import model_spec_from_hf
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.atomic import fresh_file, fresh_folder, refuse_existing
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.ms_file import (
    CheckpointMeta,
    check_suffix,
    open_checkpoint,
    open_writer,
    read_meta,
    sidecar,
)
from mindformers_ext.formats.safetensors_dir import SafetensorsDir, SafetensorsDirWriter, parse_size
from mindformers_ext.formats.tensors import TensorReader, TensorWriter
from mindformers_ext.weights.convert import plan_to_hf, plan_to_mindspore
from mindformers_ext.weights.plan import Plan

CONFIG = "config.json"
DEFAULT_SHARD = 5 * 10**9
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to convert. ``model`` None takes the model that the configuration names; ``dtype`` None keeps each type."""

    input_path: Path
    output_path: Path
    reverse: bool = False
    model: str | None = None
    dtype: str | None = None
    config: Path | None = None
    max_shard_bytes: int = DEFAULT_SHARD
    overwrite: bool = False
    allow_overflow: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What was written. ``ignored`` maps a reason to the source tensors that stayed behind."""

    tensors: int
    nbytes: int
    seconds: float
    ignored: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def convert(request: ConvertRequest) -> ConvertReport:
    """Run the conversion.

    Raises:
        UserError: anything wrong with the input, the configuration or the output path; nothing is left half-written.
    """
    try:
        return _from_mindspore(request) if request.reverse else _to_mindspore(request)
    except OSError as error:
        where = f" ('{error.filename}')" if error.filename else ""
        raise UserError(
            f"the system refused to read '{request.input_path}' or to write '{request.output_path}': "
            f"{error.strerror}{where}; check the path, its permissions and the room on the disk"
        ) from error


def shard_bytes(text: str | None, reverse: bool) -> int:
    """``--max_shard_size`` in bytes. It cuts Hugging Face folders alone, so it is refused (``UserError``) elsewhere."""
    if text is None:
        return DEFAULT_SHARD
    if not reverse:
        raise UserError("--max_shard_size needs --reversed: a MindSpore checkpoint is one file")
    return parse_size(text)


def _to_mindspore(request: ConvertRequest) -> ConvertReport:
    out = request.output_path
    check_suffix(out)
    beside = sidecar(out) if out.suffix == ".ckpt" else None
    for path in (out, beside):
        if path:
            refuse_existing(path, request.overwrite)
    if out.suffix == ".safetensors" and out.parent.resolve() == request.input_path.resolve():
        raise UserError(f"output '{out}' lies among the weights of the input folder: choose another folder")
    with closing(SafetensorsDir(request.input_path)) as reader:
        config = read_config(request.config or request.input_path)
        plan = plan_to_mindspore(reader, _spec(config, request.model), request.dtype)
        check_space(out, plan)
        meta = CheckpointMeta(config=config, dtype=_dtype_of(plan), source=str(request.input_path))
        started = time.monotonic()
        with fresh_file(out, request.overwrite) as partial:
            with open_writer(partial, out.suffix, plan.targets, meta) as writer:
                _copy(plan, reader, writer, request.allow_overflow)
            if beside:  # never an old description beside new weights
                beside.unlink(missing_ok=True)
        if beside:
            with fresh_file(beside) as partial:
                partial.write_text(meta.to_text(), encoding="utf-8")
    return _report(plan, time.monotonic() - started, ())


def _from_mindspore(request: ConvertRequest) -> ConvertReport:
    out = request.output_path
    refuse_existing(out, request.overwrite)
    _protect(request)
    with closing(open_checkpoint(request.input_path)) as reader:
        config, notes = _config_of(request, read_meta(request.input_path, reader))
        plan = plan_to_hf(reader, _spec(config, request.model), dtype=request.dtype)
        check_space(out, plan)
        started = time.monotonic()
        with fresh_folder(out, request.overwrite) as partial:
            with SafetensorsDirWriter(partial, plan.targets, request.max_shard_bytes) as writer:
                _copy(plan, reader, writer, request.allow_overflow)
            text = json.dumps(_with_dtype(config, _dtype_of(plan)), indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
            if request.config and request.config.is_dir():
                for name in COMPANIONS:
                    if (request.config / name).is_file():
                        shutil.copyfile(request.config / name, partial / name)
    return _report(plan, time.monotonic() - started, notes)


def _protect(request: ConvertRequest) -> None:
    """--overwrite replaces a whole folder: only a model folder, and none that this run reads from."""
    out = request.output_path.resolve()
    for source in (request.input_path, request.config):
        if source and out in (source.resolve(), *source.resolve().parents):
            raise UserError(f"output '{request.output_path}' holds '{source}', which is read: choose another folder")
    if not request.overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file() or any(path.is_dir() for path in out.iterdir()):
        raise UserError(
            f"output '{request.output_path}' is not a plain model folder: remove it yourself or choose another"
        )


def _config_of(request: ConvertRequest, meta: CheckpointMeta | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The model's configuration and notes about where it came from."""
    if request.config is None and meta is None:
        raise UserError(
            f"'{request.input_path}' does not tell the model's sizes: pass --config with a Hugging Face config.json"
        )
    if request.config is None:
        assert meta is not None
        return meta.config, ()
    config = read_config(request.config)
    if meta is None:
        return config, ()
    keys = {*config, *meta.config} - {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}
    differing = sorted(key for key in keys if config.get(key) != meta.config.get(key))
    if not differing:
        return config, ()
    return config, (
        f"--config differs from the checkpoint's own description in {', '.join(differing)}: --config is used",
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """``config.json`` at ``path`` or in the folder ``path``; a file that is not a JSON table is a ``UserError``."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"'{file}' does not exist: the model's sizes come from a Hugging Face config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"'{file}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"'{file}' is not a table of settings")
    return config


def _spec(config: Mapping[str, Any], model: str | None) -> ModelSpec:
    spec = model_spec_from_hf(config)
    if model and model != spec.model_type:
        raise UserError(f"--model {model} but the configuration describes a {spec.model_type}: correct one of them")
    return spec


def check_space(path: Path, plan: Plan) -> None:
    """The disk of ``path`` must have room for all of ``plan``'s targets (old files stay until the new are whole)."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(place).free, sum(info.nbytes for info in plan.targets)
    if needed > free:
        raise UserError(f"'{path}' needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: make room there")


def _copy(plan: Plan, reader: TensorReader, writer: TensorWriter, allow_overflow: bool) -> None:
    for name, array in _progress(plan, plan.run(reader, allow_overflow)):
        writer.add(name, array)
        del array  # or it lives on while the next one is made


def _progress(plan: Plan, tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    from tqdm import tqdm

    total = sum(info.nbytes for info in plan.targets)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", mininterval=0.5, dynamic_ncols=True) as bar:
        for name, array in tensors:
            size = array.nbytes
            yield name, array
            del array
            bar.update(size)


def _dtype_of(plan: Plan) -> str:
    kinds = {info.dtype for info in plan.targets}
    return BY_NUMPY[kinds.pop()].long if len(kinds) == 1 else "mixed"


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with the written type under the key it uses (``torch_dtype``, or ``dtype`` since transformers 5)."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype} if dtype != "mixed" else dict(config)


def _report(plan: Plan, seconds: float, notes: tuple[str, ...]) -> ConvertReport:
    ignored: dict[str, tuple[str, ...]] = {}
    for name, reason in plan.ignored:
        ignored[reason] = (*ignored.get(reason, ()), name)
    for name, original in plan.copies:
        ignored[f"same data as {original} (tied)"] = (name,)
    return ConvertReport(len(plan.targets), sum(info.nbytes for info in plan.targets), seconds, ignored, notes)
