# SPDX-License-Identifier: Apache-2.0
"""The plan of a dense merge: for every tensor written, which tensors it comes from and with which parameters.

Made from the headers of the files alone. Everything that is wrong (missing tensors, shapes that differ, parameters
without a value) is listed at once, before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems
from mindformers_ext.formats.dtypes import BY_NUMPY, FLOATS, is_float
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.jobs.merge.config import LayerSource, MergeConfig, Slice
from mindformers_ext.jobs.merge.constants import check_constants
from mindformers_ext.jobs.merge.models import Model
from mindformers_ext.jobs.merge.parameters import Resolver
from mindformers_ext.surgery.merge.architectures import EMBEDDING, HEAD, TensorRow, known_names
from mindformers_ext.surgery.merge.settings import Method, Settings

SHOWN = 8  # problems of one kind that are listed
VOCABULARY = (EMBEDDING, HEAD)  # every architecture's


@dataclass(frozen=True)
class MergePart:
    """A tensor of a model."""

    model: str
    name: str


@dataclass(frozen=True)
class TensorTask:
    """One tensor to write. ``math`` is the type of the arithmetic; ``rows`` cuts the inputs to so many rows.

    ``copied``: the first input is written as it is, but for its type.
    """

    info: TensorInfo
    base: MergePart | None
    inputs: tuple[MergePart, ...]
    settings: Settings
    math: str
    copied: bool = False


@dataclass
class MergePlan:
    """Every tensor in file order, and what the run should say. ``vocab`` is set where rows were cut away."""

    tasks: list[TensorTask] = field(default_factory=list)
    layers: int = 0
    layer_sources: list[tuple[str, int]] = field(default_factory=list)
    vocab: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def infos(self) -> list[TensorInfo]:
        """What is written."""
        return [task.info for task in self.tasks]


def make_plan(
    config: MergeConfig,
    method: Method,
    models: Mapping[str, Model],
    *,
    allow_crimes: bool,
    truncate: bool,
    seed: int,
    strict: bool,
) -> MergePlan:
    """The plan, or one ``UserError`` with everything that is wrong."""
    problems = Problems("the merge cannot be planned")
    _check_classes(config, models, allow_crimes, problems)
    slices = _ranged(config, models, problems)
    for number, part in enumerate(slices):
        _check_sources(config, method, part, number, problems)
    problems.raise_if_any()
    planner = _Planner(config, method, models, truncate, seed, problems)
    plan = planner.run(slices)
    donor = models[config.base_model or config.models()[0]]
    plan.notes += check_constants(models, config.models(), donor, allow_crimes, problems)
    planner.resolver.report(plan.notes, problems, strict)
    _note_extras(models, plan)
    problems.raise_if_any()
    return plan


def _check_classes(config: MergeConfig, models: Mapping[str, Model], allow_crimes: bool, problems: Problems) -> None:
    kinds = {name: models[name].architecture.classes[0] for name in config.models()}
    if len(set(kinds.values())) > 1 and not allow_crimes:
        listed = ", ".join(f"'{name}' is a {kind}" for name, kind in kinds.items())
        advice = "only models of one kind share their tensors; where names and shapes are equal all the same (LLaMA and"
        problems.add(f"the models are of different kinds ({listed})", advice + " Mistral) pass --allow-crimes")


def _ranged(config: MergeConfig, models: Mapping[str, Model], problems: Problems) -> list[Slice]:
    """The slices with every layer range filled in and checked against the models."""
    result = []
    for number, part in enumerate(config.slices):
        sources = []
        for source in part.sources:
            have = models[source.model].layers
            layers = source.layers or (0, have)
            if layers[1] > have:
                problems.add(
                    f"slices[{number}]: layer_range {list(layers)} of '{source.model}'",
                    f"that model has {have} layers, so the end is at most {have}",
                )
            sources.append(replace(source, layers=layers))
        lengths = {source.model: _length(source) for source in sources}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
            problems.add(f"slices[{number}] takes different numbers of layers: {listed}", "take equally many of each")
        result.append(replace(part, sources=tuple(sources)))
    if result and not sum(_length(part.sources[0]) for part in result if part.sources):
        problems.add("the slices hold no layer at all", "give layer ranges that are not empty")
    return result


def _length(source: LayerSource) -> int:
    first, end = source.layers or (0, 0)
    return end - first


def base_of(config: MergeConfig, part: Slice) -> str | None:
    """The base model of a slice."""
    return part.base_model or config.base_model


def _check_sources(config: MergeConfig, method: Method, part: Slice, number: int, problems: Problems) -> None:
    names, base = [source.model for source in part.sources], base_of(config, part)
    if method.base == "required" and base is None:
        return problems.add(
            f"{method.name} has no base_model",
            "name the model that the others were trained from (slerp: the one of the two at t = 0)",
        )
    if method.base == "required" and base not in names:
        return problems.add(f"slices[{number}] does not list the base model '{base}'", "add it to the sources")
    count = len(names) - (method.base != "never" and base in names)
    most = method.most
    if count < method.fewest or (most is not None and count > most):
        wanted = f"exactly {method.fewest}" if method.fewest == most else f"{method.fewest} or more"
        beside = " besides the base model" if method.base != "never" and base in names else ""
        problems.add(f"slices[{number}] has {count} models{beside}", f"{method.name} takes {wanted}{beside}")


class _Planner:
    """Makes the tasks; what is wrong goes to ``problems``."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        models: Mapping[str, Model],
        truncate: bool,
        seed: int,
        problems: Problems,
    ) -> None:
        self.config, self.method, self.models = config, method, models
        self.truncate, self.problems = truncate, problems
        self.resolver = Resolver(config, method, seed, problems)
        self.plan = MergePlan()
        self.count: dict[str, int] = {}
        names = config.models()
        self.donor = models[config.base_model or names[0]]
        self.with_head = any(HEAD.name in models[name].reader.infos for name in names)
        rows = [models[name].reader.infos.get(row.name) for name in names for row in VOCABULARY]
        self.fewest_tokens = min((info.shape[0] for info in rows if info and info.shape), default=0)

    def run(self, slices: list[Slice]) -> MergePlan:
        table, last = self.donor.architecture, 1.0 if self.config.compat["post_gradient"] == "last" else 0.0
        for row in table.pre:
            self._add(row, slices[0], row.name, None, 0.0)
        for part in slices:
            length = _length(part.sources[0])
            for layer in range(length):
                t = layer / (length - 1) if length > 1 else 1.0
                first = part.sources[0]
                self.plan.layer_sources.append((first.model, (first.layers or (0, 0))[0] + layer))
                for row in table.layer_rows():
                    self._add(row, part, row.name.replace("{layer}", str(self.plan.layers)), layer, t)
                self.plan.layers += 1
        for row in table.post:
            self._add(row, slices[-1], row.name, None, last)
        for kind, number in self.count.items():
            if number > SHOWN:
                self.problems.add(f"and {number - SHOWN} more {kind}", "the same reason")
        return self.plan

    def _fault(self, kind: str, found: str, advice: str) -> None:
        self.count[kind] = self.count.get(kind, 0) + 1
        if self.count[kind] <= SHOWN:
            self.problems.add(found, advice)

    def _add(self, row: TensorRow, part: Slice, out: str, layer: int | None, t: float) -> None:
        """The task of one output tensor, where it exists at all."""
        parts: dict[str, MergePart] = {}
        for source in part.sources:
            name = row.name if layer is None else row.name.replace("{layer}", str((source.layers or (0, 0))[0] + layer))
            if name in self.models[source.model].reader.infos:
                parts[source.model] = MergePart(source.model, name)
        if not parts and row.optional and not (row.name == HEAD.name and self.with_head):
            return
        for source in part.sources:  # a tied tensor stands in
            if source.model not in parts and row.tied in self.models[source.model].reader.infos:
                parts[source.model] = MergePart(source.model, str(row.tied))
        missing = [source.model for source in part.sources if source.model not in parts]
        if missing and row.optional and parts and self.method.lone == "copy":
            only = next(iter(parts.values()))
            return self._append(out, row, None, (only,), Settings(), copied=True)
        if missing:
            listed = ", ".join(f"'{name}'" for name in missing)
            advice = "copy the whole model again" if not row.optional else "only models that all have it can be merged"
            return self._fault("tensors", f"'{out}' is missing in {listed}", advice)
        base = base_of(self.config, part) if self.method.base != "never" else None
        sources = [source for source in part.sources if source.model != base]
        settings = self.resolver.settings(out, part, sources, {name: p.name for name, p in parts.items()}, t)
        inputs = tuple(parts[source.model] for source in sources)
        copied = self.method.name == "passthrough" and settings.inputs[0].get("scale") == 1.0
        self._append(out, row, parts[base] if base in parts else None, inputs, settings, copied)

    def _append(
        self,
        out: str,
        row: TensorRow,
        base: MergePart | None,
        inputs: tuple[MergePart, ...],
        settings: Settings,
        copied: bool,
    ) -> None:
        parts = [*([base] if base else []), *inputs]
        infos = [self.models[part.model].reader.infos[part.name] for part in parts]
        for part, info in zip(parts, infos, strict=True):
            if not is_float(info.dtype):
                return self._fault(
                    "types", f"'{part.name}' of '{part.model}' is {info.dtype}", "only floats are merged"
                )
        shape = self._shape(out, row, parts, infos)
        if shape is None:
            return
        own = BY_NUMPY[infos[0].dtype].long
        math = self.config.dtype or own
        stored: np.dtype[Any] = FLOATS[self.config.out_dtype or math]
        self.plan.tasks.append(TensorTask(TensorInfo(out, shape, stored), base, inputs, settings, math, copied))

    def _shape(
        self, out: str, row: TensorRow, parts: list[MergePart], infos: list[TensorInfo]
    ) -> tuple[int, ...] | None:
        if row.vocab and self.truncate and all(info.shape for info in infos):
            infos = [replace(info, shape=(self._cut(info.shape[0]), *info.shape[1:])) for info in infos]
        shapes = {info.shape for info in infos}
        if len(shapes) == 1:
            return infos[0].shape
        listed = ", ".join(f"'{part.model}' {list(info.shape)}" for part, info in zip(parts, infos, strict=True))
        if not row.vocab or len({shape[1:] for shape in shapes}) > 1:
            self._fault("shapes", f"'{out}' has different shapes: {listed}", "only equal shapes can be merged")
            return None
        self._fault(
            "vocabularies",
            f"'{out}' has a different number of tokens: {listed}",
            "the vocabularies differ; where all ids below the smallest mean the same in every model, "
            "--unsafe-truncate-embeddings cuts the rest away",
        )
        return None

    def _cut(self, rows: int) -> int:
        """``rows`` of an embedding or a head, cut to the shortest of all models."""
        if rows > self.fewest_tokens:
            self.plan.vocab = self.fewest_tokens
        return self.fewest_tokens


def _note_extras(models: Mapping[str, Model], plan: MergePlan) -> None:
    for model in models.values():
        known = known_names(model.architecture, model.layers)
        extra = [name for name in model.reader.infos if name not in known]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            plan.notes.append(
                f"'{model.name}' has tensors that a {model.architecture.model_type} does not have, left "
                f"behind: {extra[0]}{more}"
            )


def parameters_of(infos: list[TensorInfo]) -> int:
    """How many numbers are written."""
    return sum(prod(info.shape) for info in infos)
