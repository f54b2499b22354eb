# SPDX-License-Identifier: Apache-2.0
"""Hidden features on disk: shards of float16 per layer, written as they come, read back shard by shard.

``<folder>/{hidden_inputs, hidden_gate_outputs | hidden_up_outputs}/layer<l>/<rank>_<i>.pth`` (docs/formats.md). The
reference's older files lie without the folder of the layer where only one layer was kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.engine.door import read_numbers, write_numbers
from mindformers_ext.jobs.experts.dense_model import POINT_OF
from mindformers_ext.jobs.experts.probe import Part

INPUTS = "hidden_inputs"
OUTPUTS = {"gate_proj": "hidden_gate_outputs", "up_proj": "hidden_up_outputs"}
FORMATS = ("pth", "npy")
LARGEST = float(np.finfo(np.float16).max)
_SHARD = re.compile(r"(\d+)_(\d+)\.(" + "|".join(FORMATS) + ")")


def features_folder(save_path: Path, model: str) -> Path:
    """Where the features of a model lie."""
    return save_path / f"{model}-Hidden-Features"


def manifest(rank: int) -> str:
    """The file that tells what a process's features are of."""
    return f"features_{rank}.json"


def manifests(folder: Path) -> list[Path]:
    """The manifests of all processes, and of earlier ones."""
    return sorted(path for path in folder.glob("features_*.json") if path.is_file())


def features_rows(folder: Path) -> list[str]:
    """What texts the features in ``folder`` are of, a word for each process that wrote; empty where nobody tells."""
    return sorted(str(read_object(path).get("rows")) for path in manifests(folder))


def check_features(folder: Path, layers: Sequence[int], template: str, weights: str) -> None:
    """What the manifests in ``folder`` tell must fit; features of another tool have none.

    Args:
        folder: where the features lie.
        layers: that will be read.
        template: the matrix that they must be of.
        weights: fingerprint of the model that they must be of.

    Raises:
        UserError: unfinished, or of another model or matrix.
    """
    found = {path.name: read_object(path) for path in manifests(folder)}
    again, begun = "run features again", any(folder.glob(".states_*")) and not found
    ranks = {one.get("ranks") for one in found.values()} or {0}
    if begun or ranks != {len(found)} or any(manifest(rank) not in found for rank in range(len(found))):
        raise UserError(f"'{folder}' holds features that are not finished: {again} with the same options, in all ranks")
    for one in found.values():
        if one.get("weights") != weights:
            raise UserError(f"'{folder}' holds features of other weights than --model_path has: {again}")
        if one.get("template") != template:
            raise UserError(f"'{folder}' holds features of --templates {one.get('template')}: give the same here")
        missing = [layer for layer in layers if layer not in one.get("layers", ())]
        if missing:
            raise UserError(f"'{folder}' holds no finished features of layers {missing}: {again} with them")


class FeatureSink:
    """Writes what a pass gives (``jobs.experts.probe.Sink``), ``interval`` batches to a shard; the last one is shorter.

    ``most``: tokens of one shard.
    """

    gradients: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, kind: str, rank: int, interval: int, fmt: str, widths: tuple[int, int], most: int
    ) -> None:
        self.values: tuple[str, ...] = ("mlp_input", POINT_OF[kind])
        self.nbytes = 2 * 2 * most * sum(widths)  # a shard, and its copy while it is written
        self._folders = [folder / INPUTS, folder / OUTPUTS[kind]]
        self._rank, self._interval, self._format, self._widths, self._most = rank, interval, fmt, widths, most
        self._shards: list[np.ndarray] = []
        self._filled, self._number = 0, 0

    def take(self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: object) -> None:
        """Keep a part's tokens; the shard before it is written."""
        number = part.batch // self._interval
        if number != self._number:
            self._write(layer)
            self._number = number
        if not self._shards:
            self._shards = [np.empty((self._most, width), np.float16) for width in self._widths]
        for name, shard in zip(self.values, self._shards, strict=True):
            shard[self._filled : self._filled + len(values[name])] = _halved(values[name], name, layer)
        self._filled += len(part.rows)

    def end(self, layer: int) -> None:
        """Write the last shard of a layer."""
        self._write(layer)
        self._number = 0

    def _write(self, layer: int) -> None:
        for folder, shard in zip(self._folders, self._shards, strict=bool(self._shards)):
            place = folder / f"layer{layer}" / f"{self._rank}_{self._number}.{self._format}"
            place.parent.mkdir(parents=True, exist_ok=True)
            if self._filled:
                write_shard(place, shard[: self._filled])
        self._filled = 0


def write_shard(path: Path, array: np.ndarray) -> None:
    """One array, whole or not at all, in place of an older one."""
    if path.suffix == ".npy":
        with fresh_file(path, overwrite=True) as beside, beside.open("wb") as file:
            np.save(file, array)
    else:
        write_numbers(path, array, overwrite=True)


def read_shard(path: Path, allow_pickle: bool = False) -> np.ndarray:
    """The array (tokens, width) of a shard.

    Raises:
        UserError: no file of numbers, another shape, or a value that is no number.
    """
    if path.suffix == ".npy":
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"'{path}' is no array of numpy ({error}): write the features again") from error
    else:
        found = read_numbers(path, allow_pickle)
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
        raise UserError(f"'{path}' holds no array of float numbers: write the features again")
    if found.ndim > 2:
        raise UserError(
            f"'{path}' has {found.ndim} dimensions {found.shape}: features are (tokens, width), with padding taken out"
        )
    if found.ndim != 2 or not found.size:
        raise UserError(f"'{path}' has shape {found.shape}: features are (tokens, width)")
    if not np.isfinite(found).all():
        raise UserError(f"'{path}' holds values that are no numbers: write the features again")
    return found


@dataclass(frozen=True)
class LayerFeatures:
    """The shards of one layer, inputs and outputs in the same order."""

    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    allow_pickle: bool = False

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, D) and (tokens, F) of each shard.

        Raises:
            UserError: a pair differs in its number of tokens.
        """
        for first, second in zip(self.inputs, self.outputs, strict=True):
            x, a = read_shard(first, self.allow_pickle), read_shard(second, self.allow_pickle)
            if len(x) != len(a):
                raise UserError(f"'{first}' has {len(x)} tokens, '{second}' has {len(a)}: write both again, in one run")
            yield x, a


def find_features(folder: Path, kind: str, layer: int, allow_pickle: bool = False) -> LayerFeatures:
    """The shards of a layer, in the order of ranks and numbers.

    Raises:
        UserError: no such folder, none of this layer, or other shards of inputs than of outputs.
    """
    if not folder.is_dir():
        raise UserError(f"--hidden_features_path '{folder}' is no folder: give the one that features wrote")
    inputs, outputs = (_shards(folder / name, layer) for name in (INPUTS, OUTPUTS[kind]))
    if not inputs and not outputs:
        raise UserError(f"'{folder}' holds no features of layer {layer}: write them (features --specify_layer {layer})")
    if inputs.keys() != outputs.keys():
        alone = sorted(inputs.keys() ^ outputs.keys())
        raise UserError(
            f"layer {layer}: {len(inputs)} files in {INPUTS}, {len(outputs)} in {OUTPUTS[kind]} (only in one: "
            f"{', '.join(f'{rank}_{number}' for rank, number in alone[:5])}): write the features again, or give "
            "--templates the matrix that they are of"
        )
    order = sorted(inputs)
    return LayerFeatures(tuple(inputs[key] for key in order), tuple(outputs[key] for key in order), allow_pickle)


def _shards(folder: Path, layer: int) -> dict[tuple[int, int], Path]:
    place = folder / f"layer{layer}"
    if not place.is_dir():
        place = folder  # the layout without folders of layers
        if layer or any(folder.glob("layer*")):
            return {}
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        match = _SHARD.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink():
            found[int(match[1]), int(match[2])] = path
    return found


def _halved(values: np.ndarray, name: str, layer: int) -> np.ndarray:
    largest = float(np.abs(values).max(initial=0))
    if not largest <= LARGEST:
        raise UserError(
            f"layer {layer}: {name} reaches {largest:.3g}, beyond float16 ({LARGEST:.0f}): leave the layer out "
            "(--specify_layer), or use select --stream, which stores nothing in float16"
        )
    return values.astype(np.float16)
