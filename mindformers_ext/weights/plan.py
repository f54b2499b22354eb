# SPDX-License-Identifier: Apache-2.0
"""From rule tables and what a file holds to a checked list of steps; then one tensor at a time, block by block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mindformers_ext.core.errors import LISTED, Problems, UserError
from mindformers_ext.core.pruning import ROOT as MASKED
from mindformers_ext.formats.blocks import keep_pages
from mindformers_ext.formats.dtypes import BY_NUMPY, cast, is_float
from mindformers_ext.formats.tensors import Array, Index, TensorInfo, TensorReader
from mindformers_ext.weights.rules import Extras, RuleSet
from mindformers_ext.weights.views import BLOCK, Shape, View, boxes, describe, leaves, stream, whole

Direction = Literal["to_ms", "to_hf", "relayout"]


@dataclass
class Overflow:
    """Whether finite values may become infinite in a cast, and how many did, by source tensor."""

    allow: bool = False
    lost: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PlannedTensor:
    """One target and where its data comes from."""

    target: TensorInfo
    view: View

    def __str__(self) -> str:
        """A line for people."""
        kind = BY_NUMPY[self.target.dtype].long
        return f"{self.target.name} {self.target.shape} {kind} <- {describe(self.view)}"


@dataclass(frozen=True)
class Plan:
    """A conversion that cannot miss a tensor. ``ignored`` pairs a source name with the reason it stays behind.

    ``recast`` is the type of every target but those in ``kept``; None keeps all types.
    """

    steps: tuple[PlannedTensor, ...]
    ignored: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str], ...]
    recast: np.dtype[Any] | None
    kept: frozenset[str] = frozenset()

    @property
    def targets(self) -> tuple[TensorInfo, ...]:
        """Name, shape and type of every tensor to come, in order."""
        return tuple(step.target for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of data to come."""
        return sum(info.nbytes for info in self.targets)

    def check_copies(self, reader: TensorReader) -> None:
        """Second names of a tensor (tied head) must hold its bits; ``UserError`` otherwise."""
        for name, original in self.copies:
            if not _same_bits(reader, name, original):
                raise UserError(
                    f"'{name}' differs from '{original}' although the model ties them (tie_word_embeddings true): "
                    "set tie_word_embeddings to false in config.json, or remove the tensor"
                )

    def stream(
        self, reader: TensorReader, overflow: Overflow | None = None
    ) -> Iterator[tuple[TensorInfo, Iterator[Array]]]:
        """Yield each target with its data in blocks, C order; take all blocks before the next target.

        Raises:
            UserError: finite values become infinite and ``overflow`` does not allow it.
        """
        self.check_copies(reader)
        keep_pages()
        source, scratch = _Source(reader, self.recast, self.kept, overflow or Overflow()), list[Array]()
        for step in self.steps:
            yield step.target, stream(step.view, source, scratch)

    def run(self, reader: TensorReader, allow_overflow: bool = False) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) per target, whole; errors as ``stream``."""
        for info, blocks in self.stream(reader, Overflow(allow_overflow)):
            yield info.name, assemble(info, blocks)


def assemble(info: TensorInfo, blocks: Iterable[Array]) -> Array:
    """One array of consecutive blocks."""
    out = np.empty(info.shape, info.dtype)
    flat, done = out.reshape(-1), 0
    for block in blocks:
        flat[done : done + block.size] = block.reshape(-1)
        done += block.size
    if done != out.size:
        raise ValueError(f"'{info.name}': {done} elements came, {out.size} were announced")
    return out


@dataclass(frozen=True)
class _Source:
    """A reader whose blocks leave in the type ``recast``."""

    reader: TensorReader
    recast: np.dtype[Any] | None
    kept: frozenset[str]
    overflow: Overflow

    def read(self, name: str, index: Index) -> Array:
        return self.reader.read(name, index)

    def finish(self, name: str, block: Array) -> Array:
        if self.recast is None or name in self.kept:
            return block
        result, lost = cast(block, self.recast)
        if lost:
            if not self.overflow.allow:
                raise self._too_large(name, self.recast)
            self.overflow.lost[name] += lost
        return result

    def _too_large(self, name: str, recast: np.dtype[Any]) -> UserError:
        info = self.reader.infos[name]
        parts = (_box(self.reader, name, box) for box in boxes(info.shape, BLOCK))
        lost, size = sum(cast(array, recast)[1] for array in parts), int(np.prod(info.shape))
        return UserError(
            f"'{name}': {lost} of {size} values do not fit {BY_NUMPY[recast].long} and would become "
            "infinite: choose bf16 or fp32, or pass --allow_overflow True"
        )


def make_plan(
    rules: RuleSet,
    direction: Direction,
    infos: Mapping[str, TensorInfo],
    dtype: np.dtype[Any] | None,
    target: RuleSet | None = None,
) -> Plan:
    """Check ``infos`` against ``rules`` and list the steps.

    Args:
        rules: the table of the source's style and layout.
        direction: "relayout" is from one MindSpore layout to another.
        infos: what the source holds.
        dtype: the type of every target; None keeps each tensor's.
        target: the table of a relayout's target.

    Raises:
        UserError: tensors missing, unexpected, misshaped or of a type that holds no weights; all of them listed.
    """
    from_hf = direction == "to_ms"
    if any(name.startswith(MASKED) for name in infos):
        raise UserError(
            "the checkpoint holds the masks of a pruning run, and its weights are not yet cut by them: make a model "
            "folder of it with tools/prune.py cut"
        )
    wanted = {
        name: shape for binding in rules.bindings for name, shape in (binding.hf if from_hf else binding.ms).items()
    }
    ignored, copies = _set_aside(infos, wanted, rules.hf_extras if from_hf else rules.ms_extras)
    problems = Problems("tensors of the " + ("Hugging Face folder" if from_hf else "MindSpore checkpoint"))
    _check_names(problems, wanted, [name for name in infos if name not in ignored and name not in dict(copies)])
    _check_kinds(problems, wanted, infos)
    problems.raise_if_any()
    views = _views(rules, direction, target)
    if dtype is None:
        _check_one_dtype(problems, views, infos)
        problems.raise_if_any()
    steps = []
    for name, view in views.items():
        kind = dtype or infos[next(leaves(view)).name].dtype
        steps.append(PlannedTensor(TensorInfo(name, view.shape, kind), view))
    kept = _kept(rules.ms_extras, direction, ignored)
    steps += [PlannedTensor(infos[name], whole(name, infos[name].shape)) for name in kept]
    return Plan(tuple(steps), tuple(ignored.items()), copies, dtype, frozenset(kept))


def _kept(extras: Extras, direction: Direction, ignored: dict[str, str]) -> list[str]:
    """What one MindSpore layout hands to another as it is; taken out of ``ignored``."""
    if direction != "relayout":
        return []
    names = [name for name in ignored if any(re.fullmatch(pattern, name) for pattern in extras.kept)]
    for name in names:
        del ignored[name]
    return names


def _views(rules: RuleSet, direction: Direction, target: RuleSet | None) -> dict[str, View]:
    """Every target as a view of stored tensors: through Hugging Face's names, which all tables share."""
    views: dict[str, View] = {}
    if direction == "to_ms":
        for binding in rules.bindings:
            views |= binding.ms_views({name: whole(name, shape) for name, shape in binding.hf.items()})
        return views
    hf = {name: view for binding in rules.bindings for name, view in binding.hf_views().items()}
    if direction == "to_hf":
        return hf
    if target is None:
        raise ValueError("a relayout needs the target's table")
    for binding in target.bindings:
        views |= binding.ms_views(hf)
    return views


def _set_aside(
    infos: Mapping[str, TensorInfo], wanted: Collection[str], extras: Extras
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    copies = tuple((name, of) for name, of in extras.copies if name in infos and of in infos and name not in wanted)
    ignored = {}
    for name in infos:
        reason = extras.reason_to_ignore(name)
        if reason and name not in wanted:
            ignored[name] = reason
    return ignored, copies


def _check_names(problems: Problems, wanted: Mapping[str, Shape], given: Collection[str]) -> None:
    unexpected = [name for name in given if name not in wanted]
    present = set(given)
    missing = [name for name in wanted if name not in present]
    if unexpected and missing and len(missing) == len(wanted):
        problems.add(
            f"none of the {len(unexpected)} tensors has a name of this model: the first is '{unexpected[0]}', not "
            f"'{missing[0]}'",
            "check the model type in config.json, or save the model's own state_dict, without what wraps it",
        )
        return
    for name in missing[:LISTED]:
        problems.add(f"'{name}' {wanted[name]} is missing", "the file must hold it")
    _add_rest(problems, "missing", missing)
    for name in unexpected[:LISTED]:
        problems.add(f"'{name}' is unexpected", "no rule uses it; check the model type and the sizes in config.json")
    _add_rest(problems, "unexpected", unexpected)


def _check_kinds(problems: Problems, wanted: Mapping[str, Shape], infos: Mapping[str, TensorInfo]) -> None:
    wrong = [info for name, shape in wanted.items() if (info := infos.get(name)) and info.shape != shape]
    for info in wrong[:LISTED]:
        problems.add(f"'{info.name}' has shape {info.shape}", f"the model's sizes ask for {wanted[info.name]}")
    _add_rest(problems, "misshaped", [info.name for info in wrong])
    odd = [info for name in wanted if (info := infos.get(name)) and not is_float(info.dtype)]
    for info in odd[:LISTED]:
        problems.add(f"'{info.name}' has type {info.dtype}", "weights must be floating point, not quantised")
    _add_rest(problems, "of another type", [info.name for info in odd])


def _check_one_dtype(problems: Problems, views: Mapping[str, View], infos: Mapping[str, TensorInfo]) -> None:
    for target, view in views.items():
        sources = list(dict.fromkeys(slab.name for slab in leaves(view)))
        kinds = sorted({str(infos[name].dtype) for name in sources})
        if len(kinds) > 1:
            problems.add(
                f"'{sources[0]}' and its {len(sources) - 1} partners have types {', '.join(kinds)}",
                f"they make '{target}': choose its type with --dtype",
            )


def _add_rest(problems: Problems, what: str, names: Collection[str]) -> None:
    if len(names) > LISTED:
        problems.add(f"{len(names) - LISTED} more tensors are {what}", f"{len(names)} in all")


def _box(reader: TensorReader, name: str, box: Iterable[tuple[int, int]]) -> Array:
    return reader.read(name, tuple(slice(start, stop) for start, stop in box))


def _same_bits(reader: TensorReader, left: str, right: str) -> bool:
    one, other = reader.infos[left], reader.infos[right]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(
        _box(reader, left, box).tobytes() == _box(reader, right, box).tobytes() for box in boxes(one.shape, BLOCK)
    )
