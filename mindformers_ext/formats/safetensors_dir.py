# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face weights folder: one ``model.safetensors``, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import TABLES, read_object
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.tensors import Array, Index, TensorInfo

CONFIG = "config.json"  # of the model whose weights a folder holds
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


NO_MODEL = re.compile(r"(adapter_|consolidated).*")  # weights that may lie beside a model's


class SafetensorsDir:
    """A ``TensorReader`` over all shards of a folder. Headers are read and checked on opening, data on demand."""

    def __init__(self, folder: Path) -> None:
        """Open every shard; missing, damaged or contradicting shards are one ``UserError``."""
        self.folder = folder
        listed = weight_files(folder)
        problems = Problems(f"weights of '{folder}'")
        self._files: dict[str, SafetensorsFile] = {}
        for name in listed:
            try:
                self._files[name] = SafetensorsFile(folder / name)
            except UserError as error:
                problems.add(f"shard {name} cannot be used", str(error))
        places: dict[str, str] = {}
        for file_name, file in self._files.items():
            for name in file.infos:
                if name in places:
                    problems.add(f"'{name}' is in {places[name]} and in {file_name}", "a tensor belongs to one shard")
                places[name] = file_name
        if not problems.lines:
            _check_index(problems, listed, places)
        if problems.lines:
            self.close()
        problems.raise_if_any()
        self._places = places
        self.infos: Mapping[str, TensorInfo] = {name: self._files[at].infos[name] for name, at in places.items()}

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        return self._files[self._places[name]].read(name, index)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """File name -> tensors that the index puts there; None where there is no index."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: give the folder with config.json and *.safetensors")
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        listed = _read_index(index)
        if single.is_file() and SINGLE not in listed:
            raise UserError(f"'{folder}' holds both {SINGLE} and {INDEX}, which does not list it: remove one of them")
        return dict(listed)
    if single.is_file():
        return {SINGLE: None}
    found = _others(folder)
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise UserError(f"'{folder}' holds {len(found)} safetensors files but no {INDEX}: copy the index too")
    adapters = sorted(path.name for path in folder.glob("adapter_model.*"))
    if adapters:
        raise UserError(
            f"'{folder}' holds an adapter ({adapters[0]}) and no model: give the folder of its base, or merge both "
            f"first (in a merge's YAML, BASE+{folder.name})"
        )
    other = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    advice = "save the model again with safe_serialization=True" if other else "give a Hugging Face model folder"
    raise UserError(f"'{folder}' holds no safetensors weights{' but ' + other[0] if other else ''}: {advice}")


def has_model(folder: Path) -> bool:
    """Whether ``folder`` holds safetensors weights of a model, or what is left of them."""
    return any((folder / name).is_file() for name in (INDEX, SINGLE)) or bool(_others(folder))


def _others(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors") if not NO_MODEL.fullmatch(path.name))


def _read_index(path: Path) -> dict[str, list[str]]:
    return read_weight_map(path, r"[\w.\-]+\.safetensors")


def read_weight_map(path: Path, pattern: str) -> dict[str, list[str]]:
    """The index at ``path``: file name -> its tensors. File names match ``pattern`` as a whole, or it is a
    ``UserError``, as is anything that is no index."""
    places = read_object(path, "copy the index again", TABLES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"'{path}' has no weight_map with tensors: copy the index again")
    files: dict[str, list[str]] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or not re.fullmatch(pattern, name, re.ASCII):
            raise UserError(f"'{path}' puts '{tensor}' into {str(name)[:80]!r}: expected a weight file of this folder")
        files.setdefault(name, []).append(tensor)
    return dict(sorted(files.items()))


def _check_index(problems: Problems, listed: Mapping[str, list[str] | None], places: Mapping[str, str]) -> None:
    by_file: dict[str, set[str]] = {}
    for name, place in places.items():
        by_file.setdefault(place, set()).add(name)
    for file_name, names in listed.items():
        if names is None:
            continue
        held = by_file.get(file_name, set())
        for name in sorted(set(names) - held):
            problems.add(f"'{name}' is not in {file_name}", f"{INDEX} puts it there; copy that shard again")
        for name in sorted(held - set(names)):
            problems.add(f"'{name}' of {file_name} is not in {INDEX}", "index and shards belong to different models")


def split_shards(targets: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Consecutive groups of at most ``max_bytes`` of data; a larger tensor has a shard of its own."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in targets:
        if shards[-1] and used + info.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.nbytes
    return shards


class SafetensorsDirWriter:
    """Fills ``folder`` with shards and their index from tensors that come one at a time."""

    def __init__(self, folder: Path, targets: Sequence[TensorInfo], max_bytes: int) -> None:
        """Announce every tensor; ``max_bytes`` of data go into one shard."""
        shards = split_shards(targets, max_bytes)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        self._folder = folder
        self._place = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
        self._size = sum(info.nbytes for info in targets)
        self._stack = ExitStack()
        metadata = {"format": "pt"}  # transformers refuses files that do not say it
        self._writers = {
            name: self._stack.enter_context(SafetensorsFileWriter(folder / name, shard, metadata))
            for name, shard in zip(names, shards, strict=True)
        }

    def add(self, name: str, array: Array) -> None:
        """Write one tensor into its shard."""
        self._writers[self._place[name]].add(name, array)

    def add_parts(self, info: TensorInfo, parts: Iterable[Array]) -> None:
        """Write one tensor that comes in consecutive ``parts`` into its shard."""
        self._writers[self._place[info.name]].add_parts(info, parts)

    def __enter__(self) -> SafetensorsDirWriter:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the shards and write the index of several."""
        self._stack.__exit__(kind, value, trace)
        if kind is None and len(self._writers) > 1:
            index = {"metadata": {"total_size": self._size}, "weight_map": dict(sorted(self._place.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
