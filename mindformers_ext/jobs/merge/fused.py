# SPDX-License-Identifier: Apache-2.0
"""Mixtral files of transformers 5 hold the experts of a layer as two fused tensors: seen as one matrix per expert.

gate_up_proj is (E, 2F, D) with the gate's rows above those of up, down_proj (E, D, F).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindformers_ext.formats.tensors import Array, Index, TensorInfo
from mindformers_ext.jobs.checkpoint.source import Reader

FUSED = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(?:experts\.(gate_up_proj|down_proj)|(gate)\.weight)"
)


@dataclass(frozen=True)
class _Place:
    """Where an expert's matrix lies: rows ``first`` to ``end`` of expert ``expert``; None: the tensor itself."""

    name: str
    expert: int | None = None
    first: int = 0
    end: int = 0


class SplitExperts:
    """A ``Reader`` that gives every fused tensor as the matrices of its experts, under Mixtral's published names."""

    def __init__(self, reader: Reader) -> None:
        """See ``reader`` that way; names that are not fused stay."""
        self._reader = reader
        self._places: dict[str, _Place] = {}
        infos: dict[str, TensorInfo] = {}
        for name, info in reader.infos.items():
            for place, shown in _split(name, info):
                self._places[shown.name] = place
                infos[shown.name] = shown
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, index: Index = ()) -> Array:
        """The matrix, or the rows of it that ``index`` selects."""
        place = self._places[name]
        if place.expert is None:
            return self._reader.read(place.name, index)
        rows = index[0] if index else slice(None)
        if isinstance(rows, int):
            return self._reader.read(place.name, (place.expert, place.first + rows, *index[1:]))
        start, stop, _ = rows.indices(place.end - place.first)
        return self._reader.read(place.name, (place.expert, slice(place.first + start, place.first + stop), *index[1:]))

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def split_experts(reader: Reader) -> Reader:
    """``reader`` itself, or a view of it where experts are fused."""
    fused = any((match := FUSED.fullmatch(name)) and match[2] for name in reader.infos)
    return SplitExperts(reader) if fused else reader


def _split(name: str, info: TensorInfo) -> list[tuple[_Place, TensorInfo]]:
    match = FUSED.fullmatch(name)
    if not match:
        return [(_Place(name), info)]
    moe = f"{match[1]}.block_sparse_moe."
    if match[3]:
        return [(_Place(name), TensorInfo(moe + "gate.weight", info.shape, info.dtype))]
    experts, rows, columns = info.shape
    half = rows // 2
    parts = (("w1", 0, half), ("w3", half, rows)) if match[2] == "gate_up_proj" else (("w2", 0, rows),)
    return [
        (
            _Place(name, e, first, end),
            TensorInfo(f"{moe}experts.{e}.{short}.weight", (end - first, columns), info.dtype),
        )
        for e in range(experts)
        for short, first, end in parts
    ]
