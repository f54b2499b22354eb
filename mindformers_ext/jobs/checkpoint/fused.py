# SPDX-License-Identifier: Apache-2.0
"""Files of transformers 5 hold the experts of a layer as two fused tensors: seen as one matrix per expert.

Names, shapes and order are those of the family's table (``weights.tables``): a fused tensor goes to MindSpore's stack
of experts and from there to the published names, both as views.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo
from mindformers_ext.weights.rules import Rule, bind
from mindformers_ext.weights.tables import TABLES
from mindformers_ext.weights.views import Slab, View, whole

PER_EXPERT = "per_expert"  # the published spelling


@dataclass(frozen=True)
class Spellings:
    """One family's rules of fused tensors, by a pattern of their names, and the published ones by MindSpore's name."""

    fused: tuple[tuple[re.Pattern[str], Rule], ...]
    published: Mapping[str, Rule]


@cache
def spellings(family: str) -> Spellings:
    """What ``family``'s table says of fused experts; nothing for a family without experts."""
    styles = TABLES[family].mixtures if family in TABLES else {}
    published = styles.get(PER_EXPERT, ())
    known = {rule.hf for rule in published}
    listed = dict.fromkeys(rule for rules in styles.values() for rule in rules if rule.hf not in known)
    patterns = (re.escape(rule.hf_templates[0][0]).replace(re.escape("{layer}"), r"(\d+)") for rule in listed)
    return Spellings(
        tuple((re.compile(pattern), rule) for pattern, rule in zip(patterns, listed, strict=True)),
        {rule.ms[0]: rule for rule in published},
    )


class UnfusedReader:
    """A ``Reader`` that gives every fused tensor as the matrices of its experts, under the published names."""

    def __init__(self, reader: Reader, family: str) -> None:
        """See ``reader`` that way; names that are not fused stay."""
        self._reader = reader
        self._slabs: dict[str, Slab] = {}
        infos: dict[str, TensorInfo] = {}
        for name, info in reader.infos.items():
            for shown, slab in _split(name, info.shape, spellings(family)):
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


def unfused(reader: Reader, family: str) -> Reader:
    """``reader`` itself, or a view of it where a model of ``family`` has its experts fused."""
    fused = any(
        len(info.shape) == 3 and pattern.fullmatch(name)
        for name, info in reader.infos.items()
        for pattern, _ in spellings(family).fused
    )
    return UnfusedReader(reader, family) if fused else reader


def _split(name: str, shape: tuple[int, ...], known: Spellings) -> Iterator[tuple[str, Slab]]:
    """The published names of a fused tensor's matrices and where they lie; of another tensor its own."""
    stored = whole(name, shape)
    for pattern, rule in known.fused:
        match = pattern.fullmatch(name)
        sizes = _sizes(rule, shape) if match else {}
        if match and sizes and bind(rule, int(match[1]), sizes).hf[name] == shape:
            for ms_name, view in zip(rule.ms, rule.transform.to_ms([stored]), strict=True):
                yield from _published(known.published[ms_name], view, int(match[1]), sizes)
            return
    yield name, stored


def _published(rule: Rule, view: View, layer: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, Slab]]:
    binding = bind(rule, layer, sizes)
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
