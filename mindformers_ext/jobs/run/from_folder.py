# SPDX-License-Identifier: Apache-2.0
"""What a folder tells about the model in it: a Hugging Face folder, a run's folder, or a checkpoint with a description.

Nothing but texts and headers is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.hf import hf_notes, model_spec_from_hf
from mindformers_ext.core.config.run import ASCEND, AUTO, CPU, GPU, MINDSPORE, MODEL, PYTORCH, TRAINING
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import dtype_name
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.data import tokenizer_settings
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import CheckpointMeta
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.safetensors_file import SafetensorsFile
from mindformers_ext.jobs.checkpoint.saved import checkpoint_file
from mindformers_ext.jobs.checkpoint.source import is_hf_file, own_meta, read_config
from mindformers_ext.jobs.run.checks import has_device

ABOVE = 4  # a run's folder, checkpoint/, rank_0/, a file
FULL = "float32"


@dataclass(frozen=True)
class Described:
    """A model as its folder tells it. ``tokenizer`` None: none was found; ``stored``: type of the weights; ``notes``:
    keys of config.json without effect."""

    model: ModelSpec
    load: Path
    tokenizer: Path | None
    stored: str
    notes: tuple[str, ...] = ()


def describe(path: Path) -> Described:
    """The model at ``path``: a Hugging Face folder, a run's folder or a checkpoint below it, or a checkpoint that has a
    description.

    Raises:
        UserError: nothing there, or nothing that tells the model's sizes.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist: give a Hugging Face folder, the folder of a run, or a checkpoint")
    folder = path.parent if is_hf_file(path) else path
    if (folder / CONFIG).is_file():
        return _from_hf(read_config(folder), path, (folder,))
    kept = next(_kept_configs(path), None)
    if kept is not None:
        return _from_run(kept, path)
    for suffix in (".ckpt", ".safetensors"):
        file = checkpoint_file(path, suffix)
        meta = _meta(file) if file and file.suffix == suffix else None
        if file and meta and meta.config:
            return _from_hf(meta.config, path, (file.parent, Path(meta.source)))
    raise UserError(
        f"nothing tells the sizes of the model in {path}: give a Hugging Face folder (config.json), the folder of a "
        "run (run_config/), or a checkpoint that convert_weight.py wrote; or describe the model in a YAML (--config)"
    )


def this_device(engine: str | None) -> tuple[str, str | None]:
    """The best device of this machine for ``engine`` (None: any), and the engine where the device does not tell it."""
    if engine != PYTORCH and has_device(ASCEND):
        return ASCEND, engine
    if engine != MINDSPORE and has_device(GPU):
        return GPU, engine
    if engine in (None, AUTO) and importlib.util.find_spec("mindspore") is None:
        return CPU, PYTORCH
    return CPU, engine


def record_shape(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Rows, tokens of a row and columns of the MindRecord file ``path``.

    Raises:
        UserError: no MindRecord of token rows, or an empty one.
    """
    with closing(MindRecordFile(path)) as file:
        columns = tuple(name for name in ("input_ids", "labels") if name in file.fields)
        if not len(file) or "input_ids" not in columns:
            raise UserError(f"{path} holds no rows of input_ids: write it with llama_preprocess.py")
        return len(file), len(file.read(0, columns)[0]), columns


def _from_hf(config: Mapping[str, Any], load: Path, folders: tuple[Path, ...]) -> Described:
    stored = dtype_name(config.get("torch_dtype") or config.get("dtype")) or FULL
    found = next((folder for folder in folders if _has_tokenizer(folder)), None)
    return Described(model_spec_from_hf(config), load, found, stored, tuple(hf_notes(config)))


def _from_run(kept: Path, path: Path) -> Described:
    """A run's own YAML, which lies in its folder."""
    config = load_yaml(kept)
    folder = kept.parent.parent
    if section_at(config, MODEL).get("pet_config"):
        raise UserError(
            f"{folder} is a run with adapters: merge them into its base first (python tools/merge_lora.py --help) and "
            "give the result"
        )
    words = section_at(config, "processor.tokenizer")
    named = str(words.get("vocab_file") or words.get("tokenizer_file") or "")
    tokenizer = next((place for place in (folder, *([Path(named)] if named else [])) if _has_tokenizer(place)), None)
    spec = network_spec_from_yaml(config)
    return Described(
        spec.model, folder / "checkpoint" if path == folder else path, tokenizer, spec.numerics.param_dtype
    )


def _kept_configs(path: Path) -> Iterator[Path]:
    """The YAMLs of training that runs have left in ``path`` or above it."""
    for folder in [path, *path.parents][:ABOVE]:
        for mode in TRAINING:
            kept = folder / "run_config" / f"{mode}.yaml"
            if kept.is_file() and (folder == path or path.is_relative_to(folder / "checkpoint")):
                yield kept


def _has_tokenizer(place: Path) -> bool:
    return place.is_file() or any(
        (place / name).is_file() for name in (tokenizer_settings.TABLE, tokenizer_settings.MODEL)
    )


def _meta(file: Path) -> CheckpointMeta | None:
    with closing(SafetensorsFile(file) if file.suffix == ".safetensors" else CkptFile(file)) as reader:
        return own_meta(file, reader)
