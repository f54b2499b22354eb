# SPDX-License-Identifier: Apache-2.0
"""How MindSpore cut a model: which part of which tensor each rank holds, as its strategy files tell.

The ranks of one pipeline stage form a device matrix, last axis fastest. A tensor map names, for each tensor axis, the
device axis (counted from the right) that cuts it, or -1. Ranks that would hold the same part may share it further
(optimizer sharding): the first tensor axis is cut once more among groups of ``opt_size`` such ranks in rising order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError, listed
from mindformers_ext.formats.strategy_file import RawLayout, RawStrategy, read_strategy_file

Box = tuple[slice, ...]
"""A part of a tensor: one slice of step 1 for each axis."""
SUFFIXES = (".ckpt", ".json")

MAX_DEVICES = 2**20
_STAGED = re.compile(r"(\d{1,9})-(.+)")
_RANK = re.compile(r"_rank_(\d{1,9})$")


@dataclass(frozen=True)
class SliceLayout:
    """One parameter over the ranks of its stage. ``tensor_map``: per tensor axis the device axes, slowest first."""

    device_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    opt_size: int = 1

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each tensor axis is cut, optimizer sharding included."""
        sizes = self._cuts()
        return (sizes[0] * self.opt_size, *sizes[1:]) if sizes else ()

    def _cuts(self) -> tuple[int, ...]:
        return tuple(prod(self.device_matrix[-1 - axis] for axis in axes) for axes in self.tensor_map)

    def place(self, rank: int) -> tuple[int, ...]:
        """Which part ``rank`` (counted within its stage) holds, along each axis."""
        coordinates = []
        for size in reversed(self.device_matrix):  # device axis 0 first
            rank, coordinate = divmod(rank, size)
            coordinates.append(coordinate)
        numbers = []
        for axes in self.tensor_map:
            number = 0
            for axis in axes:
                number = number * self.device_matrix[-1 - axis] + coordinates[axis]
            numbers.append(number)
        if self.opt_size > 1:
            used = {axis for axes in self.tensor_map for axis in axes}
            twin = 0  # the rank's number among those with the same part, in rising order
            for axis in reversed(range(len(coordinates))):
                if axis not in used:
                    twin = twin * self.device_matrix[-1 - axis] + coordinates[axis]
            numbers[0] = numbers[0] * self.opt_size + twin % self.opt_size
        return tuple(numbers)

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor whose parts have shape ``part``."""
        return tuple(size * count for size, count in zip(part, self.parts, strict=True))

    def box(self, shape: tuple[int, ...], rank: int) -> Box:
        """What ``rank`` (within its stage) holds of a tensor of ``shape``, which ``parts`` must divide."""
        result = []
        for size, count, number in zip(shape, self.parts, self.place(rank), strict=True):
            step = size // count
            result.append(slice(number * step, (number + 1) * step))
        return tuple(result)

    def fault(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of ``shape`` cannot be cut this way, or None when it can."""
        if len(shape) != len(self.tensor_map):
            return f"shape {shape} has {len(shape)} axes, its strategy {len(self.tensor_map)}"
        if any(size % count for size, count in zip(shape, self.parts, strict=True)):
            return f"shape {shape} cannot be cut into {self.parts} parts"
        return None


@dataclass(frozen=True)
class Strategy:
    """All stages of one run: by stage, the layout of each parameter it holds. Stage i has ranks i*devices and on."""

    stages: tuple[Mapping[str, SliceLayout], ...]
    devices: int
    source: str

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.devices * len(self.stages)

    def names(self) -> dict[str, int]:
        """Every parameter and its first stage, in the order of the files."""
        result: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            for name in stage:
                result.setdefault(name, number)
        return result

    def ranks(self, stage: int) -> range:
        """The ranks of ``stage``."""
        return range(stage * self.devices, (stage + 1) * self.devices)


def read_strategy(path: Path) -> Strategy:
    """Read one strategy file (of one rank, or merged), or a folder with the files of all ranks or of one per stage.

    Raises:
        UserError: no strategy there, a damaged file, a stage missing, files of different runs, layouts that no device
            matrix allows; all of them listed.
    """
    files = _files(path)
    raws = _distinct([read_strategy_file(file) for file in files])
    problems = Problems(f"strategy '{path}'")
    _check_ranks(problems, files, stages := _stages(problems, raws))
    problems.raise_if_any()
    parsed = [_layouts(problems, stage, raw) for stage, raw in sorted(stages.items())]
    counts = sorted({prod(layout.device_matrix) for stage in parsed for layout in stage.values()} - {1}) or [1]
    if len(counts) > 1:
        problems.add(f"device matrices of {', '.join(map(str, counts))} ranks", "all of a run have as many")
    missing = sorted(set(range(len(parsed))) - set(stages))
    if missing:
        found, lacking = (", ".join(map(str, numbers)) for numbers in (sorted(stages), missing))
        problems.add(f"stage {found} without stage {lacking}", "give the folder with the files of all pipeline stages")
    total = counts[0] * len(parsed)
    beyond = [file.name for file in files if (match := _RANK.search(file.stem)) and int(match[1]) >= total]
    if beyond:
        problems.add(
            f"files of ranks beyond the {total} that it describes: {listed(beyond)}",
            "a stage's files are missing, or they belong to another run",
        )
    problems.raise_if_any()
    return Strategy(tuple(parsed), counts[0], str(path))


def _files(path: Path) -> list[Path]:
    """The strategy files at ``path``, in order of their names."""
    if not path.exists():
        raise UserError(f"strategy '{path}' does not exist: check the path")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise UserError(
            f"strategy folder '{path}' holds no strategy files (*{' or *'.join(SUFFIXES)}): give the folder "
            "output/strategy of the run, with at least one file for each pipeline stage. A run on one device or in "
            "data parallel writes none: its ranks hold whole weights, so take the file of rank_0, without a strategy"
        )
    kinds = {file.suffix for file in found}
    if len(kinds) > 1:
        raise UserError(f"strategy folder '{path}' mixes .ckpt and .json files: keep one kind")
    return found


def _distinct(raws: list[RawStrategy]) -> list[RawStrategy]:
    """One of each content: the ranks of a stage write equal files."""
    kept: dict[int | None, list[RawStrategy]] = {}
    for raw in raws:
        others = kept.setdefault(raw.stage, [])
        if not any(raw.layouts == other.layouts for other in others):
            others.append(raw)
    return [raw for others in kept.values() for raw in others]


def _stages(problems: Problems, raws: list[RawStrategy]) -> dict[int, tuple[Path, dict[str, RawLayout]]]:
    """By stage, one file's layouts. A merged file tells its stages in the names; beside others it must say the same."""
    result: dict[int, tuple[Path, dict[str, RawLayout]]] = {}
    for raw in sorted(raws, key=lambda raw: any(_STAGED.fullmatch(name) for name in raw.layouts)):
        if not raw.layouts or raw.stage is None:
            problems.add(f"'{raw.path.name}' describes no parameters", "it is empty; save the strategies again")
            continue
        matches = {name: _STAGED.fullmatch(name) for name in raw.layouts}
        if not any(matches.values()):
            parts = {raw.stage: dict(raw.layouts)}
        else:
            parts = {}
            for name, match in matches.items():
                if match is None:
                    problems.add(
                        f"'{raw.path.name}' names '{name}' without a stage and others with one", "it was merged wrongly"
                    )
                    break
                parts.setdefault(int(match[1]), {})[match[2]] = raw.layouts[name]
        for stage, layouts in parts.items():
            first = result.setdefault(stage, (raw.path, layouts))
            if first[1] != layouts:
                problems.add(
                    f"'{raw.path.name}' and '{first[0].name}' describe stage {stage} differently",
                    "files of two runs lie in one folder; keep those of one",
                )
    return result


def _check_ranks(problems: Problems, files: list[Path], stages: Mapping[int, object]) -> None:
    if stages and max(stages) >= MAX_DEVICES:
        problems.add(f"stage {max(stages)}", "no run has so many")
    if not stages and not problems.lines:
        problems.add(f"{len(files)} files without a layout", "they are empty; save the strategies again")


def _layouts(problems: Problems, stage: int, raw: tuple[Path, Mapping[str, RawLayout]]) -> dict[str, SliceLayout]:
    result = {}
    for name, row in raw[1].items():
        layout, wrong = _layout(row)
        if layout is None:
            problems.add(f"'{name}' of stage {stage} in '{raw[0].name}' {wrong}", "no cut follows from it")
        else:
            result[name] = layout
    return result


def _layout(raw: RawLayout) -> tuple[SliceLayout | None, str]:
    """The layout, or why there is none."""
    matrix, tensor_map = raw.dev_matrix, tuple(tuple(axis for axis in axes if axis != -1) for axes in raw.tensor_map)
    used = [axis for axes in tensor_map for axis in axes]
    if any(size < 1 for size in matrix) or prod(matrix) > MAX_DEVICES:
        return None, f"has device matrix {list(matrix)}"
    if any(not 0 <= axis < len(matrix) for axis in used) or len(set(used)) < len(used):
        return None, f"has tensor map {[list(axes) for axes in raw.tensor_map]} over device matrix {list(matrix)}"
    if raw.field or any(raw.split_shape) or any(raw.offsets):
        return None, "is an embedding cut unevenly or by fields (param_split_shape, field), which is not supported"
    free = [place for place, size in enumerate(matrix) if len(matrix) - 1 - place not in used and size > 1]
    twins = prod(matrix[place] for place in free)
    size = twins if raw.opt_size == -1 else raw.opt_size
    told = f"has optimizer sharding of size {raw.opt_size} and step {raw.opt_step} over {twins} equal ranks"
    if size < 0 or raw.opt_step < 0 or (size > 1 and (raw.opt_step == 0 or twins % size or not tensor_map)):
        return None, told
    if raw.opt_step == 0 or size <= 1:
        return SliceLayout(matrix, tensor_map), ""
    if len(free) == 1 and raw.opt_step != prod(matrix[free[0] + 1 :]):
        return None, f"{told}, which are {prod(matrix[free[0] + 1 :])} apart"
    return SliceLayout(matrix, tensor_map, size), ""
