# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder with PyTorch files: ``pytorch_model.bin``, or shards with an index. Torch is imported here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.dtypes import BFLOAT16, BY_NUMPY
from mindformers_ext.formats.safetensors_dir import read_weight_map
from mindformers_ext.formats.tensors import Array, Index, TensorInfo
from mindformers_ext.jobs.engine.door import open_torch_file
from mindformers_ext.jobs.engine.protocols import TensorFile

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NO_WEIGHTS = re.compile(r"(adapter_model|training_args|optimizer|scheduler|rng_state.*|scaler)\.(bin|pt)")
BY_LONG = {row.long: dtype for dtype, row in BY_NUMPY.items()}


class TorchDir:
    """A ``TensorReader`` over the PyTorch files of a folder, or over one file."""

    def __init__(self, path: Path) -> None:
        """Open every file; missing, damaged or contradicting ones are one ``UserError``."""
        listed = {path.name: None} if path.is_file() else torch_files(path)
        folder = path.parent if path.is_file() else path
        problems = Problems(f"weights of '{path}'")
        self._files: dict[str, TensorFile] = {}
        self._places: dict[str, str] = {}
        infos: dict[str, TensorInfo] = {}
        for file_name in listed:
            try:
                self._files[file_name] = open_torch_file(folder / file_name)
            except UserError as error:
                problems.add(f"{file_name} cannot be used", str(error))
                continue
            for name, (shape, kind) in self._files[file_name].infos.items():
                if name in self._places:
                    problems.add(f"'{name}' is in {self._places[name]} and in {file_name}", "it belongs to one file")
                if kind not in BY_LONG:
                    problems.add(f"'{name}' has type {kind}", "weights are " + ", ".join(BY_LONG))
                    continue
                self._places[name] = file_name
                infos[name] = TensorInfo(name, shape, BY_LONG[kind])
        if not problems.lines:
            _check_places(problems, listed, self._places)
        problems.raise_if_any()
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, index: Index = ()) -> Array:
        """A copy of the tensor, or of the part that ``index`` selects."""
        array = self._files[self._places[name]].read(name, index)
        return array.view(BFLOAT16) if self.infos[name].dtype == BFLOAT16 else array

    def close(self) -> None:
        """Let go of every file."""
        self._files.clear()


def torch_files(folder: Path) -> Mapping[str, list[str] | None]:
    """File name -> tensors that the index puts there, None where there is no index; empty without any such file."""
    index = folder / INDEX
    if index.is_file():
        files = read_weight_map(index, r"[\w.\-]+\.bin")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"'{folder}' lacks {len(missing)} files of {INDEX}, first {missing[0]}: copy them too")
        return files
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
    found = [name for name in found if not NO_WEIGHTS.fullmatch(name)]
    if len(found) > 1:
        raise UserError(f"'{folder}' holds {len(found)} PyTorch files but no {INDEX}: copy the index too")
    return {name: None for name in found}


def _check_places(problems: Problems, listed: Mapping[str, list[str] | None], places: Mapping[str, str]) -> None:
    for file_name, names in listed.items():
        held = {name for name, place in places.items() if place == file_name}
        for name in sorted(set(names if names is not None else held) ^ held):
            where = "the index only" if name not in held else f"{file_name} only"
            problems.add(f"'{name}' is in {where}", f"{INDEX} and its files belong to different models")
