# SPDX-License-Identifier: Apache-2.0
"""The models of a merge: found on this machine, opened lazily, described by a table of tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import MIXTRAL
from mindformers_ext.formats.dtypes import FLOATS
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.formats.tensors import Reader
from mindformers_ext.jobs.checkpoint.fused import unfused
from mindformers_ext.jobs.checkpoint.hub import from_hub
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.merge.adapted import AdaptedReader
from mindformers_ext.jobs.merge.adapters import open_adapter
from mindformers_ext.jobs.merge.references import split_reference
from mindformers_ext.surgery.merge.architectures import Architecture, architecture_of


@dataclass(frozen=True)
class Model:
    """An open model. ``name`` is what the user calls it; ``reader`` has its adapter merged where it names one;
    ``notes`` are on the names in its files."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    architecture: Architecture
    layers: int
    reader: Reader
    notes: tuple[str, ...] = ()


def find_model(name: str, download: bool = False) -> Path:
    """The folder of a model: a path, or a name on the hub that was downloaded before or, with ``download``, is now.

    Raises:
        UserError: it is neither.
    """
    path = Path(os.path.expanduser(name))  # leaves a user that does not exist as it is
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"model '{name}' is a file: give the folder with config.json and the weights")
    return from_hub(name, download)


def folders_of(names: Sequence[str], download: bool = False) -> list[Path]:
    """Every folder that models and adapters ``names`` are read from; errors as ``find_model``."""
    parts = [part for name in names for part in split_reference(name) if part]
    return [find_model(part, download) for part in parts]


@contextmanager
def opened(names: Sequence[str], adapted: str | None = None) -> Iterator[dict[str, Model]]:
    """Every model by its name; faults of all of them in one ``UserError``. Closed at the end.

    ``adapted``: the type of tensors that an adapter touches; None keeps the model's.
    """
    problems, models = Problems("the models"), {}
    try:
        for name in names:
            try:
                models[name] = _open(name, adapted)
            except UserError as error:
                problems.add(f"'{name}' cannot be used", str(error))
        problems.raise_if_any()
        yield models
    finally:
        for model in models.values():
            model.reader.close()


def _open(name: str, adapted: str | None) -> Model:
    model, adapter = split_reference(name)
    folder = find_model(model)
    config = read_config(folder)
    if config.get("quantization_config"):
        raise UserError(f"'{folder}' holds quantised weights: merge the float16 or bfloat16 original")
    architecture = architecture_of(config, str(folder / CONFIG))
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise UserError(f"'{folder / CONFIG}' has num_hidden_layers={layers!r}: a whole number above 0 is expected")
    reader = open_hf(folder)
    try:
        return _seen(Model(name, folder, config, architecture, layers, reader, notes_of(reader)), adapter, adapted)
    except UserError:
        reader.close()
        raise


def _seen(model: Model, adapter: str | None, adapted: str | None) -> Model:
    """``model`` with fused experts as matrices and its adapter merged, if there are any."""
    reader, experts = model.reader, model.architecture.experts
    if experts:
        reader = unfused(reader, MIXTRAL.name)
    if model.layers * max(experts, 1) > len(reader.infos):  # a plan has a row for each
        wanted = f"{model.layers} layers" + (f" of {experts} experts" if experts else "")
        raise UserError(f"'{model.folder / CONFIG}' says {wanted}, and there are {len(reader.infos)} tensors")
    if adapter:
        lora = open_adapter(find_model(adapter), reader.infos)
        reader = AdaptedReader(reader, lora, FLOATS[adapted] if adapted else None)
    return replace(model, reader=reader)
