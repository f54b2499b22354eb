# SPDX-License-Identifier: Apache-2.0
"""The plan of a mixture: every tensor written, and where it comes from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.layers import dtype_name
from mindformers_ext.formats.dtypes import FLOATS, is_float
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.jobs.merge.fit import check_fit, full_config
from mindformers_ext.jobs.merge.models import Model
from mindformers_ext.jobs.merge.moe_config import Expert, MoEConfig
from mindformers_ext.jobs.merge.moe_outputs import BIASES, DOWN, GATE, UP, WHY_NOT, Output
from mindformers_ext.surgery.merge.architectures import EMBEDDING, HEAD, known_names


@dataclass(frozen=True)
class Neurons:
    """Neurons in an order of their own, ``ratio`` of them drawn anew; the streams of both draws."""

    ratio: float
    order: int
    redrawn: int


@dataclass(frozen=True)
class CopyFrom:
    """A matrix of a model, with ``noise`` of that deviation added and then times ``scale``.

    ``cut``: (axis, first, end) of the rows or columns that are taken, None for all; of those in the order of
    ``neurons``, which lie along that axis, where it is given.
    """

    model: str
    name: str
    noise: float = 0.0
    scale: float = 1.0
    stream: int = 0  # of the random numbers
    cut: tuple[int, int, int] | None = None
    neurons: Neurons | None = None


@dataclass(frozen=True)
class GateRows:
    """Rows ``first`` to ``end`` of a layer's router; shared experts come after the others."""

    layer: int
    first: int
    end: int


@dataclass(frozen=True)
class Zeros:
    """A vector of zeros."""

    length: int


Origin = CopyFrom | GateRows | Zeros


@dataclass(frozen=True)
class Target:
    """A tensor to write: its sources one after the other, along the first axis (or two of a fused tensor)."""

    info: TensorInfo
    sources: tuple[Origin, ...]


def plan_targets(
    config: MoEConfig, models: Mapping[str, Model], fused: bool, problems: Problems
) -> tuple[list[Target], list[str]]:
    """Every tensor in file order and notes; what does not fit goes to ``problems``."""
    base = models[config.base_model]
    for model in models.values():
        _check_kind(config.output, model, base, problems)
    kinds = {model.architecture.model_type for model in models.values()}
    if config.output.one_kind and len(kinds) > 1 and not problems.lines:
        listed = ", ".join(sorted(kinds))
        problems.add(f"the models are {listed}", f"a {config.output.name} is made of models of one kind")
    if problems.lines:
        return [], []
    wanted = config.dtype or dtype_name(base.config.get("torch_dtype")) or str(base.config.get("torch_dtype"))
    embedding = base.reader.infos.get(EMBEDDING.name)
    dtype = FLOATS.get(wanted) or (embedding.dtype if embedding else np.dtype(np.float32))
    shapes = {name: info.shape for name, info in base.reader.infos.items()}
    check_fit(shapes, base.architecture, base.config, f"'{base.name}'", problems)
    if problems.lines:
        return [], []
    width, segments = int(full_config(base.architecture, base.config)["intermediate_size"]), config.segments
    if width % segments:
        problems.add(
            f"intermediate_size {width} of '{base.name}' is no multiple of segments {segments}", "choose another"
        )
    if problems.lines:
        return [], []
    builder = _Builder(config, models, dtype, problems)
    targets = builder.run(fused)
    known = known_names(base.architecture, base.layers)
    extra = [name for name in base.reader.infos if name not in known]
    notes = (
        [
            f"'{base.name}' has tensors that a Mixtral does not have, left behind: {extra[0]}"
            + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
        ]
        if extra
        else []
    )
    count = len(config.experts) * segments
    if count & (count - 1):
        notes.append(f"{count} experts are no power of two: llama.cpp may refuse the model")
    if config.experts_per_token % segments:
        notes.append(
            f"experts_per_token {config.experts_per_token} is no multiple of segments {segments}: of one model only "
            "a part is then computed"
        )
    return targets, notes


def _check_kind(output: Output, model: Model, base: Model, problems: Problems) -> None:
    kind = model.architecture.model_type
    if kind not in output.fits:
        problems.add(
            f"'{model.name}' is a {model.architecture.classes[0]}: {WHY_NOT.get(kind, f'it fits no {output.name}')}",
            "take LLaMA or Mistral models of one size as base and experts (two fine-tuned Llama-3-8B, for example)",
        )
    for key in ("attention_bias", "mlp_bias"):
        if model.config.get(key):
            problems.add(
                f"'{model.name}' has {key}",
                f"a {output.name} has none of these biases, they would be lost: take models without",
            )
    heads, width = model.config.get("num_attention_heads"), model.config.get("head_dim")
    if output.biased and width and heads and width * heads != model.config.get("hidden_size"):
        problems.add(f"'{model.name}' has head_dim {width}", f"a {output.name} has hidden_size / num_attention_heads")
    activations = ("silu", "swish", None)
    if model.config.get("hidden_act") not in activations:
        problems.add(
            f"'{model.name}' has hidden_act {model.config['hidden_act']!r}", "the experts are computed with silu"
        )
    if model.layers != base.layers:
        problems.add(
            f"'{model.name}' has {model.layers} layers, the base {base.layers}", "all models need equally many"
        )


class _Builder:
    """Makes the targets."""

    def __init__(
        self, config: MoEConfig, models: Mapping[str, Model], dtype: np.dtype[Any], problems: Problems
    ) -> None:
        self.config, self.models, self.dtype, self.problems = config, models, dtype, problems
        self.base = models[config.base_model]
        self.full = full_config(self.base.architecture, self.base.config)
        self.targets: list[Target] = []

    def run(self, fused: bool) -> list[Target]:
        table = self.base.architecture
        for row in table.pre:
            self._from_base(row.name, row.optional)
        rows = [row for row in table.layer_rows() if ".mlp." not in row.name and not row.name.endswith(".bias")]
        for layer in range(self.base.layers):
            for row in rows:
                self._from_base(row.name.replace("{layer}", str(layer)), row.optional)
            if self.config.output.biased:
                self._biases(f"model.layers.{layer}.")
            if layer in self.config.dense:
                for kind in _shapes(1, 1):
                    self._from_base(f"model.layers.{layer}.mlp.{kind}.weight", optional=False)
            else:
                self._moe(layer, fused)
        for row in table.post:
            tied = bool(self.base.config.get("tie_word_embeddings", False))
            self._from_base(row.name, row.optional and (tied or row.name != HEAD.name))
        return self.targets

    def _biases(self, layer: str) -> None:
        """Those of the base, zeros where it has none."""
        for name in (layer + bias for bias in BIASES):
            weight = self.base.reader.infos.get(name.removesuffix("bias") + "weight")
            if name in self.base.reader.infos or weight is None:
                self._from_base(name, optional=False)
            else:
                self._append(name, weight.shape[:1], Zeros(weight.shape[0]))

    def _from_base(self, name: str, optional: bool) -> None:
        info = self.base.reader.infos.get(name)
        if info is None and not optional:
            self.problems.add(f"'{name}' is missing in '{self.base.name}'", "copy the whole model again")
        elif info is not None and is_float(info.dtype):
            self._append(name, info.shape, CopyFrom(self.base.name, name))
        elif info is not None:
            self.problems.add(f"'{name}' of '{self.base.name}' is {info.dtype}", "only floats are assembled")

    def _append(self, name: str, shape: tuple[int, ...], *sources: Origin) -> None:
        self.targets.append(Target(TensorInfo(name, shape, self.dtype), sources))

    def _moe(self, layer: int, fused: bool) -> None:
        old, output = f"model.layers.{layer}.mlp.", self.config.output
        new = old if fused else f"model.layers.{layer}.{output.moe}"
        hidden, width, segments = self.full["hidden_size"], self.full["intermediate_size"], self.config.segments
        whole, width = _shapes(width, hidden), width // segments
        shapes = _shapes(width, hidden)
        parts = [(expert, segment) for expert in self.config.experts for segment in range(segments)]
        count = len(parts)
        found = {
            (place, kind): self._expert(expert, place, f"{old}{kind}.weight", whole[kind], segment)
            for place, (expert, segment) in enumerate([*parts, *((expert, None) for expert in self.config.shared)])
            for kind in shapes
        }
        self._append(new + "gate.weight", (count, hidden), GateRows(layer, 0, count))
        if fused:
            both = tuple(found[place, kind] for place in range(count) for kind in (GATE, UP))
            self._append(new + "experts.gate_up_proj", (count, 2 * width, hidden), *both)
            downs = tuple(found[place, DOWN] for place in range(count))
            self._append(new + "experts.down_proj", (count, hidden, width), *downs)
        else:
            for place in range(count):
                for kind, word in output.matrices.items():
                    self._append(f"{new}experts.{place}.{word}.weight", shapes[kind], found[place, kind])
        if self.config.shared:
            for kind, word in output.matrices.items():
                self._append(f"{new}shared_expert.{word}.weight", whole[kind], found[count, kind])
            self._append(new + "shared_expert_gate.weight", (1, hidden), GateRows(layer, count, count + 1))

    def _expert(self, expert: Expert, place: int, name: str, shape: tuple[int, ...], segment: int | None) -> CopyFrom:
        """A matrix of an expert: that of the model, or its ``segment``, whose output then counts as often as it is cut.

        The router's weights of chosen experts sum to 1, so each of m segments has 1/m of what the whole would have.
        """
        info = self.models[expert.model].reader.infos.get(name)
        if info is None:
            self.problems.add(f"'{name}' is missing in '{expert.model}'", "copy the whole model again")
        elif info.shape != shape:
            self.problems.add(
                f"'{name}' of '{expert.model}' is {list(info.shape)}, the base has {list(shape)}",
                "experts need the sizes of the base",
            )
        elif not is_float(info.dtype):
            self.problems.add(f"'{name}' of '{expert.model}' is {info.dtype}", "only floats are assembled")
        kind, segments = name.split(".")[-2], self.config.segments
        out = kind == DOWN
        scale = expert.residual_scale if out and expert.residual_scale is not None else 1.0
        cut = neurons = None
        if segment is not None:
            scale *= self.config.routed_factors.get(kind, 1.0)
            axis = 1 if out else 0
            width = shape[axis] // segments
            neurons = self._neurons(place // segments, name)
            if segments > 1 or neurons:
                cut = (axis, segment * width, (segment + 1) * width)
        return CopyFrom(expert.model, name, expert.noise_scale or 0.0, scale, _stream(place, name), cut, neurons)

    def _neurons(self, copy: int, name: str) -> Neurons | None:
        """Those of a whole feed-forward, before it is cut: one order for its three matrices."""
        shuffle, layer = self.config.shuffle, name.split("mlp.")[0]
        if shuffle is None:
            return None
        redrawn = _stream(copy, "redrawn", layer if shuffle.same else name)
        return Neurons(shuffle.ratio, _stream(copy, "order", layer), redrawn)


def _stream(*words: object) -> int:
    """The stream of random numbers that has this name."""
    return zlib.crc32(" ".join(map(str, words)).encode())


def _shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a feed-forward of that width."""
    return {GATE: (width, hidden), DOWN: (hidden, width), UP: (width, hidden)}
