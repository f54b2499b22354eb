# SPDX-License-Identifier: Apache-2.0
"""Mixtral files of transformers 5 hold the experts of a layer as two fused tensors: seen as one matrix per expert.

Names, shapes and order are those of ``weights.mixtral``: a fused tensor goes to MindSpore's stack of experts and from
there to the published names, both as views.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mindformers_ext.formats.tensors import Array, Index, TensorInfo
from mindformers_ext.jobs.checkpoint.source import Reader
from mindformers_ext.weights.mixtral import PER_EXPERT, STYLES
from mindformers_ext.weights.rules import Rule, bind
from mindformers_ext.weights.views import Slab, View, whole

FUSED = tuple(
    (re.compile(re.escape(rule.hf_templates[0][0]).replace(re.escape("{layer}"), r"(\d+)")), rule)
    for style, rules in STYLES.items()
    for rule in rules
    if style != "per_expert"
)
PUBLISHED = {rule.ms[0]: rule for rule in PER_EXPERT}


class UnfusedReader:
    """A ``Reader`` that gives every fused tensor as the matrices of its experts, under Mixtral's published names."""

    def __init__(self, reader: Reader) -> None:
        """See ``reader`` that way; names that are not fused stay."""
        self._reader = reader
        self._slabs: dict[str, Slab] = {}
        infos: dict[str, TensorInfo] = {}
        for name, info in reader.infos.items():
            for shown, slab in _split(name, info.shape):
                self._slabs[shown] = slab
                infos[shown] = TensorInfo(shown, slab.shape, info.dtype)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, index: Index = ()) -> Array:
        """The matrix, or the rows of it that ``index`` selects."""
        slab = self._slabs[name]
        kept = slab.ranges[slab.dropped :]
        items = (*index, *(slice(None) for _ in kept[len(index) :]))
        return self._reader.read(
            slab.name,
            (
                *(start for start, _, _ in slab.ranges[: slab.dropped]),
                *(_moved(item, start, stop) for item, (start, stop, _) in zip(items, kept, strict=True)),
            ),
        )

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def unfused(reader: Reader) -> Reader:
    """``reader`` itself, or a view of it where experts are fused."""
    fused = any(
        len(info.shape) == 3 and pattern.fullmatch(name) for name, info in reader.infos.items() for pattern, _ in FUSED
    )
    return UnfusedReader(reader) if fused else reader


def _split(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Slab]]:
    """The published names of a fused tensor's matrices and where they lie; of another tensor its own."""
    stored = whole(name, shape)
    for pattern, rule in FUSED:
        match = pattern.fullmatch(name)
        sizes = _sizes(rule, shape) if match else {}
        if match and sizes and bind(rule, int(match[1]), sizes).hf[name] == shape:
            for ms_name, view in zip(rule.ms, rule.transform.to_ms([stored]), strict=True):
                yield from _published(ms_name, view, int(match[1]), sizes)
            return
    yield name, stored


def _published(ms_name: str, view: View, layer: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, Slab]]:
    binding = bind(PUBLISHED[ms_name], layer, sizes)
    for name, part in zip(binding.hf, binding.transform.to_hf([view], tuple(binding.hf.values())), strict=True):
        assert isinstance(part, Slab)
        yield name, part


def _sizes(rule: Rule, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes behind the letters of ``rule.dims``, where its tensor has ``shape``; empty where it cannot."""
    letters = rule.hf_templates[0][1].split()
    if len(letters) != len(shape):
        return {}
    return {"2": 2} | {
        word[-1]: size // (2 if word[0] == "2" else 1) for word, size in zip(letters, shape, strict=True)
    }


def _moved(item: int | slice, first: int, end: int) -> int | slice:
    """``item`` of an axis that starts at ``first`` of the stored one."""
    if isinstance(item, int):
        return first + item
    start, stop, _ = item.indices(end - first)
    return slice(first + start, first + stop)
