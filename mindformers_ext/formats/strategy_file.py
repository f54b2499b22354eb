# SPDX-License-Identifier: Apache-2.0
"""The text of MindSpore's strategy files, protobuf (``.ckpt``) or ``.json``, without MindSpore. Meaning: strategy.py.

Protobuf, from MindSpore's node_strategy.proto: ParallelStrategyMap { uint32 current_stage = 1; repeated
ParallelStrategyItem parallel_strategy_item = 2; repeated ParallelLayoutItem parallel_layout_item = 3 };
ParallelStrategyItem { string node_name = 1; ParallelStrategys = 2 { uint32 stage = 1; .. } }; ParallelLayoutItem
{ string param_name = 1; ParallelLayouts = 2 { repeated { repeated int dim = 1 } dev_matrix = 1, tensor_map = 2,
param_split_shape = 3, indices_offset = 4; int32 field = 5, opt_weight_shard_step = 6, opt_weight_shard_size = 7 } }.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import TABLES, JsonError, parse_json
from mindformers_ext.formats.wire import BYTES, VARINT, VarintError, read_varint

MAX_BYTES = 64 * 2**20
MAX_AXES = 32
MAX_INT, MAX_NAME = 2**31 - 1, 4096
NUMBERS = ("field", "opt_weight_shard_step", "opt_weight_shard_size")
LISTS = ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset")


@dataclass(frozen=True)
class RawLayout:
    """One parameter's layout as the file has it. ``tensor_map`` holds one tuple of device axes for each tensor axis."""

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    split_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    field: int
    opt_step: int
    opt_size: int


@dataclass(frozen=True)
class RawStrategy:
    """One file: the pipeline stage of its first operator (None without operators) and every parameter's layout."""

    path: Path
    stage: int | None
    layouts: Mapping[str, RawLayout]


class _FaultError(ValueError):
    """What is wrong inside the file; ``read_strategy_file`` adds the path."""


def read_strategy_file(path: Path) -> RawStrategy:
    """Read one file; JSON if its name ends in .json, protobuf otherwise, as MindSpore does.

    Raises:
        UserError: not there, empty, too large, or not a strategy file.
    """
    if not path.is_file():
        raise UserError(f"strategy '{path}' is not a file: check the path")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise UserError(f"strategy file '{path}' has {size} bytes: expected 1 to {MAX_BYTES}; copy it again")
    data = path.read_bytes()
    try:
        stage, layouts = _from_json(data) if path.suffix == ".json" else _from_protobuf(data)
    except (_FaultError, VarintError) as error:
        fault = f"it {error}" if isinstance(error, VarintError) else error
        raise UserError(
            f"'{path}' is not a strategy file that MindSpore writes: {fault}. Give the files of output/strategy "
            "(ckpt_strategy_rank_*.ckpt or .json), or a merged one"
        ) from error
    return RawStrategy(path, stage, layouts)


def _from_protobuf(data: bytes) -> tuple[int | None, dict[str, RawLayout]]:
    stage: int | None = None
    layouts: dict[str, RawLayout] = {}
    for number, value in _fields(data, {1: VARINT, 2: BYTES, 3: BYTES}):
        if number == 2 and stage is None:
            item = dict(_fields(value, {1: BYTES, 2: BYTES}))
            numbers = dict(_fields(item.get(2, b""), {1: VARINT, 2: BYTES}))
            stage = _whole(numbers.get(1), "stage")
        elif number == 3:
            item = dict(_fields(value, {1: BYTES, 2: BYTES}))
            if set(item) != {1, 2}:
                raise _FaultError("a layout has no name or no content")
            _add(layouts, _text(item[1]), _layout_from_protobuf(item[2]))
    return stage, layouts


def _layout_from_protobuf(data: bytes) -> RawLayout:
    lists: dict[int, list[tuple[int, ...]]] = {1: [], 2: [], 3: [], 4: []}
    numbers: dict[int, int] = {}
    for number, value in _fields(data, {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: VARINT, 7: VARINT}):
        if number <= 4:
            lists[number].append(tuple(_dims(value)))
            if len(lists[number]) > MAX_AXES:
                raise _FaultError(f"a layout has more than {MAX_AXES} lists of a kind")
        elif number in numbers:
            raise _FaultError("a layout repeats a number")
        else:
            numbers[number] = _small(value)
    if len(lists[1]) != 1 or not lists[2] or set(numbers) != {5, 6, 7}:
        raise _FaultError("a layout lacks its device matrix, tensor map or numbers")
    maps = lists[2]
    # One list is one device axis for each tensor axis; several are one list for each tensor axis.
    tensor_map = tuple((axis,) for axis in maps[0]) if len(maps) == 1 else tuple(axes for axes in maps if axes)
    split_shape, offsets = (tuple(number for part in lists[place] for number in part) for place in (3, 4))
    return RawLayout(lists[1][0], tensor_map, split_shape, offsets, numbers[5], numbers[6], numbers[7])


def _fields(data: bytes, kinds: Mapping[int, int]) -> Iterator[tuple[int, Any]]:
    """Every field (number, bytes or int) of a message; unknown numbers and other wire types are faults."""
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        number, wire = key >> 3, key & 7
        if kinds.get(number) != wire:
            raise _FaultError(f"byte {position} holds an unknown field {number} of wire type {wire}")
        value, position = read_varint(data, position)
        if wire == VARINT:
            yield number, value
            continue
        if value > len(data) - position:
            raise _FaultError(f"byte {position} promises {value} bytes, {len(data) - position} are left")
        yield number, data[position : position + value]
        position += value


def _dims(data: bytes) -> Iterator[int]:
    """``repeated int dim = 1``, one by one or packed."""
    if len(data) > MAX_AXES * 11:
        raise _FaultError(f"a list has more than {MAX_AXES} numbers")
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        if key == 1 << 3 | VARINT:
            value, position = read_varint(data, position)
            yield _small(value)
        elif key == 1 << 3 | BYTES:
            length, position = read_varint(data, position)
            end = position + length
            if end > len(data):
                raise _FaultError("a list is cut")
            while position < end:
                value, position = read_varint(data, position)
                yield _small(value)
        else:
            raise _FaultError("a list holds something else than numbers")


def _small(value: int) -> int:
    """A protobuf int as a signed number of at most 31 bits."""
    number = value - 2**64 if value >= 2**63 else value
    if not -MAX_INT <= number <= MAX_INT:
        raise _FaultError(f"the number {number} is out of range")
    return number


def _text(data: bytes) -> str:
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _FaultError("a name is not text") from error
    if not 0 < len(name) <= MAX_NAME:
        raise _FaultError(f"a name has {len(name)} characters")
    return name


def _add(layouts: dict[str, RawLayout], name: str, layout: RawLayout) -> None:
    if name in layouts:
        raise _FaultError(f"parameter '{name}' occurs twice")
    layouts[name] = layout


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise _FaultError(f"{what} is {value!r}")
    return value


def _from_json(data: bytes) -> tuple[int | None, dict[str, RawLayout]]:
    try:
        content = parse_json(data, TABLES)
    except JsonError as error:
        raise _FaultError(f"it is not JSON ({error})") from error
    items, rows = (
        content.get(key) if isinstance(content, dict) else None
        for key in ("parallel_strategy_item", "parallel_layout_item")
    )
    if not isinstance(rows, dict) or not isinstance(items, dict):
        raise _FaultError("it has no parallel_layout_item or no parallel_strategy_item")
    first = next(iter(items.values()), None)
    if first is not None and not isinstance(first, dict):
        raise _FaultError("its first operator is no table")
    layouts: dict[str, RawLayout] = {}
    for name, row in rows.items():
        _add(layouts, _text(name.encode("utf-8", "replace")), _layout_from_json(name, row))
    return None if first is None else _whole(first.get("stage"), "stage"), layouts


def _layout_from_json(name: str, row: Any) -> RawLayout:
    if not isinstance(row, dict):
        raise _FaultError(f"the layout of '{name}' is no table")
    numbers: list[Any] = [row.get(key) for key in NUMBERS]
    lists = [row.get(key, []) for key in LISTS]
    if not all(type(number) is int and abs(number) <= MAX_INT for number in numbers):
        raise _FaultError(f"the layout of '{name}' has {dict(zip(NUMBERS, numbers, strict=True))}")
    if "dev_matrix" not in row or "tensor_map" not in row or not all(isinstance(item, list) for item in lists):
        raise _FaultError(f"the layout of '{name}' lacks a list")
    lists[1] = [item if isinstance(item, list) else [item] for item in lists[1]]
    flat = [*lists[0], *lists[2], *lists[3], *(axis for axes in lists[1] for axis in axes)]
    if not all(type(number) is int and abs(number) <= MAX_INT for number in flat):
        raise _FaultError(f"the lists of '{name}' hold something else than numbers")
    matrix, maps, split_shape, offsets = lists
    return RawLayout(tuple(matrix), tuple(tuple(axes) for axes in maps), tuple(split_shape), tuple(offsets), *numbers)
