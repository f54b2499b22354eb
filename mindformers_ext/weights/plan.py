# SPDX-License-Identifier: Apache-2.0
"""From a rule table and what a file holds to a checked list of steps; then one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.dtypes import BY_NUMPY, cast, is_float
from mindformers_ext.formats.tensors import Array, Index, TensorInfo, TensorReader
from mindformers_ext.weights.rules import Binding, Extras, RuleSet
from mindformers_ext.weights.transforms import Shape

Direction = Literal["to_ms", "to_hf"]
LISTED = 20


@dataclass(frozen=True)
class Step:
    """One target: the ``which``-th tensor that ``binding`` makes."""

    target: TensorInfo
    binding: Binding
    which: int


@dataclass(frozen=True)
class Plan:
    """A conversion that cannot miss a tensor. ``ignored`` pairs a source name with the reason it stays behind."""

    direction: Direction
    steps: tuple[Step, ...]
    ignored: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str], ...]
    recast: np.dtype[Any] | None

    @property
    def targets(self) -> tuple[TensorInfo, ...]:
        """Name, shape and type of every tensor to come, in order."""
        return tuple(step.target for step in self.steps)

    def run(self, reader: TensorReader, allow_overflow: bool = False) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) per target. A cast that makes finite values infinite is a ``UserError``, or allowed."""
        for name, original in self.copies:
            if not _same_bits(reader.read(name), reader.read(original)):
                raise UserError(
                    f"'{name}' differs from '{original}' although the model ties them (tie_word_embeddings true): "
                    "set tie_word_embeddings to false in config.json, or remove the tensor"
                )
        for step in self.steps:
            yield step.target.name, self._make(step, reader, allow_overflow)

    def _make(self, step: Step, reader: TensorReader, allow_overflow: bool) -> Array:
        binding = step.binding
        sources = tuple(binding.hf if self.direction == "to_ms" else binding.ms)

        def read(place: int, index: Index) -> Array:
            name = sources[place]
            array = reader.read(name, index)
            if self.recast is None:
                return array
            result, lost = cast(array, self.recast)
            if lost and not allow_overflow:
                raise UserError(
                    f"'{name}': {lost} of {array.size} values do not fit {BY_NUMPY[self.recast].long} and would become "
                    "infinite: choose bf16 or fp32, or pass --allow_overflow True"
                )
            return result

        make = binding.transform.to_ms if self.direction == "to_ms" else binding.transform.to_hf
        return make(read, step.which, tuple(binding.hf.values()))


def make_plan(
    rules: RuleSet, direction: Direction, infos: Mapping[str, TensorInfo], dtype: np.dtype[Any] | None
) -> Plan:
    """Check ``infos`` against ``rules`` and list the steps.

    Raises:
        UserError: tensors missing, unexpected, misshaped or of a type that holds no weights; all of them listed.
    """
    to_ms = direction == "to_ms"
    extras = rules.hf_extras if to_ms else rules.ms_extras
    wanted = {
        name: shape for binding in rules.bindings for name, shape in (binding.hf if to_ms else binding.ms).items()
    }
    ignored, copies = _set_aside(infos, wanted, extras)
    problems = Problems("tensors of the " + ("Hugging Face folder" if to_ms else "MindSpore checkpoint"))
    _check_names(problems, wanted, [name for name in infos if name not in ignored and name not in dict(copies)])
    _check_kinds(problems, wanted, infos)
    if not problems.lines and dtype is None:
        _check_one_dtype(problems, rules, to_ms, infos)
    problems.raise_if_any()
    steps = []
    for binding in rules.bindings:
        sources, targets = (binding.hf, binding.ms) if to_ms else (binding.ms, binding.hf)
        result = dtype or infos[next(iter(sources))].dtype
        for which, (name, shape) in enumerate(targets.items()):
            steps.append(Step(TensorInfo(name, shape, result), binding, which))
    return Plan(direction, tuple(steps), tuple(ignored.items()), copies, dtype)


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


def _check_one_dtype(problems: Problems, rules: RuleSet, to_ms: bool, infos: Mapping[str, TensorInfo]) -> None:
    for binding in rules.bindings:
        sources = tuple(binding.hf if to_ms else binding.ms)
        kinds = sorted({str(infos[name].dtype) for name in sources})
        if len(kinds) > 1:
            problems.add(f"'{sources[0]}' and its {len(sources) - 1} partners have types {', '.join(kinds)}",
                         "they make one tensor: choose its type with --dtype")  # fmt: skip


def _add_rest(problems: Problems, what: str, names: Collection[str]) -> None:
    if len(names) > LISTED:
        problems.add(f"{len(names) - LISTED} more tensors are {what}", f"{len(names)} in all")


def _same_bits(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
