# SPDX-License-Identifier: Apache-2.0
"""Opens the weights that a job is pointed at: a Hugging Face folder, a MindSpore file, or the slices of many ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import CheckpointMeta, open_checkpoint, read_meta, sidecar
from mindformers_ext.formats.rank_dirs import rank_files, rank_folders
from mindformers_ext.formats.safetensors_dir import CONFIG, INDEX, SafetensorsDir, has_model, weight_files
from mindformers_ext.formats.safetensors_file import SafetensorsFile
from mindformers_ext.formats.tensors import Reader, TensorReader
from mindformers_ext.jobs.checkpoint import renamed
from mindformers_ext.jobs.checkpoint.torch_dir import TorchDir, torch_files
from mindformers_ext.weights.layouts import Layout, resolve_layout
from mindformers_ext.weights.model_sizes import sizes_from_shapes

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
HF_MARKS = ("embed_tokens.", ".self_attn.")  # in names of Hugging Face's, in none of MindSpore's


def open_hf(path: Path) -> Reader:
    """The weights of a Hugging Face folder, or one file of weights: safetensors, else PyTorch's (imports torch), else
    those of Meta's and Mistral's own releases. A prefix that all names carry is left out.

    Raises:
        UserError: no weights there, or none that are whole.
    """
    if (path.is_file() and renamed.CONSOLIDATED.fullmatch(path.name)) or (path.is_dir() and _is_release(path)):
        path = renamed.released_file(path)
        return _seen(_open_file(path), lambda reader: renamed.as_hugging_face(reader, path))
    return _seen(
        _open_file(path) if path.is_file() else _open_folder(path), lambda reader: renamed.without_prefix(reader, path)
    )


def _is_release(folder: Path) -> bool:
    """Whether ``folder`` holds weights of Meta's or Mistral's own release, and none of Hugging Face's."""
    return bool(renamed.consolidated_files(folder)) and not has_model(folder) and not torch_files(folder)


def _open_folder(folder: Path) -> Reader:
    return (
        TorchDir(folder)
        if folder.is_dir() and not has_model(folder) and torch_files(folder)
        else SafetensorsDir(folder)
    )


def _open_file(path: Path) -> Reader:
    if path.suffix in TORCH_SUFFIXES:
        return TorchDir(path)
    if path.suffix != ".safetensors":
        return SafetensorsDir(path)
    if path.name in (weight_files(path.parent) if (path.parent / INDEX).is_file() else ()):
        raise UserError(f"'{path}' is one of several files of a model: give their folder, '{path.parent}'")
    return SafetensorsFile(path)


def _seen(reader: Reader, view: Callable[[Reader], Reader]) -> Reader:
    """``view`` of an open reader, which is closed where there is none."""
    try:
        return view(reader)
    except UserError:
        reader.close()
        raise


def is_hf_file(path: Path) -> bool:
    """Whether ``path`` is a .safetensors file whose tensors have Hugging Face's names, not MindSpore's."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    if path.name == renamed.SAFE_RELEASE and (path.parent / renamed.PARAMS).is_file():
        return True
    with closing(SafetensorsFile(path)) as file:
        return any(mark in name for name in file.infos for mark in HF_MARKS)


def open_ms(path: Path, strategy_dir: Path | None = None) -> tuple[Reader, CheckpointMeta | None]:
    """A MindSpore checkpoint and its description, which must be its own.

    Args:
        path: one file; with ``strategy_dir`` the folder above rank_0, rank_1, ...
        strategy_dir: the strategy files by which the ranks were cut.

    Raises:
        UserError: what is no whole checkpoint, or a description that belongs to another file.
    """
    if strategy_dir is not None:
        from mindformers_ext.weights.reshard import open_sliced

        if not path.is_dir():
            raise UserError(f"'{path}' is not a folder: with --strategy_dir give the folder above rank_0, rank_1, ...")
        sliced = open_sliced(path, strategy_dir)
        try:
            return sliced, rank_meta(rank_files(path)[0])
        except UserError:
            sliced.close()
            raise
    if path.is_dir() and rank_folders(path):
        raise UserError(f"'{path}' holds the slices of several ranks: pass --strategy_dir with their strategy files")
    reader = open_checkpoint(path)
    try:
        return reader, own_meta(path, reader)
    except UserError:
        reader.close()
        raise


def own_meta(path: Path, reader: CkptFile | SafetensorsFile) -> CheckpointMeta | None:
    """The description of an open checkpoint, None where it has none; one of another file is a ``UserError``."""
    meta = read_meta(path, reader)
    if meta and meta.hash and meta.hash != fingerprint(reader):
        raise UserError(
            f"'{sidecar(path)}' describes another checkpoint than '{path}': copy the pair again, or "
            "remove the description and pass --config"
        )
    return meta


def rank_meta(path: Path) -> CheckpointMeta | None:
    """The description of one rank's file, which is that of the whole model."""
    with closing(CkptFile(path) if path.suffix == ".ckpt" else SafetensorsFile(path)) as reader:
        return own_meta(path, reader)


def described_layout(meta: CheckpointMeta | None) -> Layout | None:
    """The layout that a description names."""
    return Layout(meta.layout, meta.qkv_concat) if meta else None


@dataclass(frozen=True)
class Known:
    """What is known of a MindSpore checkpoint's model. ``config`` is empty where only shapes tell its sizes."""

    config: Mapping[str, Any]
    spec: ModelSpec
    layout: Layout
    notes: tuple[str, ...]


def describe_checkpoint(
    reader: TensorReader,
    meta: CheckpointMeta | None,
    config: Path | None = None,
    model: str | None = None,
    input_layout: str | None = None,
) -> Known:
    """Sizes and layout of an open MindSpore checkpoint, from ``config``, its description, or its shapes, in this order.

    Raises:
        UserError: nothing tells, or they contradict each other.
    """
    found, notes = _config_of(meta, config)
    if found:
        spec = model_spec_from_hf(found)
    else:
        spec = sizes_from_shapes(reader.infos)
        notes = (
            *notes,
            "the checkpoint has no description: sizes were taken from its shapes; head count, rope_theta "
            "and token ids are not among them",
        )
    if meta and meta.version > 1 and meta.config and meta.experts != (spec.moe.num_local_experts if spec.moe else 0):
        raise UserError(
            f"the configuration has {spec.moe.num_local_experts if spec.moe else 0} experts, the "
            f"checkpoint's description {meta.experts}: correct --config"
        )
    check_model(spec, model)
    return Known(found, spec, resolve_layout(reader.infos, spec, described_layout(meta), input_layout), notes)


def check_model(spec: ModelSpec, model: str | None) -> None:
    """``--model`` must name what the weights are, or what a variant is one of; a ``UserError`` otherwise."""
    if model and model not in (spec.model_type, spec.family_row.variant_of):
        raise UserError(f"--model {model} but the configuration describes a {spec.model_type}: correct one of them")


def read_config(path: Path) -> Mapping[str, Any]:
    """``config.json`` at ``path`` or in the folder ``path``; a file that is not a JSON table is a ``UserError``."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file() and (file.parent / renamed.PARAMS).is_file():
        raise UserError(
            f"'{file}' does not exist: params.json beside it does not tell all of a model (theta, positions): put the "
            "config.json of the same model on the hub there"
        )
    if not file.is_file():
        raise UserError(f"'{file}' does not exist: the model's sizes come from a Hugging Face config.json")
    config = read_object(file, "give the config.json of a Hugging Face model")
    problems = Problems(f"'{file}'")
    for key, wanted, fits in KINDS:
        if not fits(config.get(key)):
            problems.add(f"{key}={str(config[key])[:80]}", f"expected {wanted}")
    problems.raise_if_any()
    return config


def _is_texts(value: object) -> bool:
    return value is None or isinstance(value, list) and all(isinstance(item, str) for item in value)


# What decides which table of a family is looked up, before any value is read.
KINDS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    ("architectures", "a list of class names", _is_texts),
    ("layer_types", "a list of names", _is_texts),
    ("model_type", "a name", lambda value: value is None or isinstance(value, str)),
)


def _config_of(meta: CheckpointMeta | None, path: Path | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The model's configuration, empty where nobody tells, and notes about where it came from."""
    own = meta.config if meta else {}
    if path is None:
        return own, ()
    config = read_config(path)
    if not own:
        return config, ()
    keys = {*config, *own} - {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}
    differing = sorted(key for key in keys if config.get(key) != own.get(key))
    if not differing:
        return config, ()
    return config, (
        f"--config differs from the checkpoint's own description in {', '.join(differing)}: --config is used",
    )
