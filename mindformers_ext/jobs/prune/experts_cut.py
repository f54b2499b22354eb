# SPDX-License-Identifier: Apache-2.0
"""A mixture with fewer experts: as a model that is run a layer at a time, and as tensors and config.json of a folder.

Rows of the gate and the experts' own tensors are taken out, nothing else changes but the inside of a gate of two layers
(``surgery.prune.experts.narrower_gate``). Which axis counts experts is what the tables of weights say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.config.hf_shared import ROUTED_WIDTH, told_variant
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, GATES
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.parameters import LAYER, ROUTED, layer_rows
from mindformers_ext.formats.tensors import Array, Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.source import read_config
from mindformers_ext.jobs.experts.dense_model import StreamedModel, open_weights
from mindformers_ext.surgery.prune.experts import HiddenGate
from mindformers_ext.weights.convert import detect_style, rule_set
from mindformers_ext.weights.plan import Plan, PlannedTensor
from mindformers_ext.weights.views import whole

EXPERTS = "E"  # the letter of how many there are, in tables of weights
FIRST, SECOND = "router.dense.weight", "router.out.weight"  # of a gate of two layers
Blocks = Callable[[], Iterator[Array]]


@dataclass(frozen=True, eq=False)
class ExpertCut:
    """By layer number: the experts that stay, rising, and what is left of a gate of two layers."""

    kept: Mapping[int, tuple[int, ...]]
    gates: Mapping[int, HiddenGate]

    @property
    def keep(self) -> int:
        """How many stay in a layer."""
        return len(next(iter(self.kept.values())))

    def rows(self, layer: int, name: str) -> tuple[int, ...]:
        """Which rows stay of a weight (E, ...), called ``name`` at its end in MindSpore's words."""
        gate = self.gates.get(layer)
        return gate.units if gate and name.endswith(FIRST) else self.kept[layer]

    def instead(self, layer: int, name: str) -> np.ndarray | None:
        """The weight that takes the place of ``name``; None where rows are enough."""
        gate = self.gates.get(layer)
        return gate.out if gate and name.endswith(SECOND) else None


@dataclass(frozen=True)
class MixtureModel(StreamedModel):
    """An open mixture; with ``cut`` as it is after the cut, of which ``spec`` then is, too."""

    config: Mapping[str, Any]
    cut: ExpertCut | None = None

    @property
    def _routed(self) -> str:
        return "feed_forward." + (ROUTED if self.moe.shared_expert else "")

    @property
    def moe(self) -> MoESpec:
        """Of its mixtures."""
        moe = self.spec.moe
        assert moe is not None  # open_mixture has looked
        return moe

    def without(self, cut: ExpertCut) -> MixtureModel:
        """The same after a cut.

        Raises:
            UserError: no config.json describes it.
        """
        return replace(self, spec=model_spec_from_hf(cut_config(self, cut)), cut=cut)

    def second_of_gate(self, layer: int) -> np.ndarray:
        """The second layer (E, E) of a gate of two."""
        steps = (step for step in self.plan.steps if step.target.name == LAYER.format(layer) + self._routed + SECOND)
        ((_, array),) = replace(self.plan, steps=tuple(steps), copies=()).run(self.reader)
        return array

    def layer(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """See ``StreamedModel``."""
        if self.cut is None or index not in self.cut.kept:
            yield from super().layer(index)
            return
        dims = {row.name: row.dims.split() for row in layer_rows(self.spec.layer(index))}
        for name, array in super().layer(index):
            new = self.cut.instead(index, name)
            if new is None and dims[name][0] == EXPERTS:
                new = array[list(self.cut.rows(index, name))]
            yield name, array if new is None else new
            del array, new


def open_mixture(folder: Path) -> MixtureModel:
    """The mixture in ``folder``; names, shapes and types are checked, no data is read but of a doubled head.

    Raises:
        UserError: no such folder, a dense model, or weights that are not those of its config.json.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: give the Hugging Face folder of a mixture of experts")
    config = read_config(folder)
    spec = model_spec_from_hf(config)
    if spec.moe is None:
        raise UserError(f"'{folder}' is a dense model: it has no experts to take out; see 'prune.py cut'")
    return MixtureModel(folder, spec, *open_weights(folder, spec), config)


def has_hidden_gate(moe: MoESpec) -> bool:
    """Whether its gate has two layers, with as many units between as there are experts."""
    return any(weight.dims == f"{EXPERTS} {EXPERTS}" for weight in GATES[moe.gate])


def cut_config(model: MixtureModel, cut: ExpertCut) -> dict[str, Any]:
    """config.json behind a cut: the number of experts, and the widths and lists that follow from it.

    Raises:
        UserError: experts of unlike sizes, or a file that says of the number of experts what is not known here.
    """
    spec, moe, config = model.spec, model.moe, dict(model.config)
    if moe.expert_sizes:
        raise UserError(
            f"'{model.folder}' has experts of unlike sizes, which would leave layers of unlike widths: one "
            "intermediate_size is for all layers; give a mixture of experts that are alike"
        )
    row = told_variant(config, FAMILIES[spec.model_type])
    keys = {word.field: word.key for word in row.words if word.part == "moe"}
    config[keys["num_local_experts"]] = cut.keep
    if row.dense_width:  # otherwise told by the number of experts
        config[row.dense_width] = spec.intermediate_size
    if row.shares_width:
        width = cut.keep * spec.expert_size
        config["intermediate_size"] = width + (moe.shared_expert.intermediate_size if moe.shared_expert else 0)
        if ROUTED_WIDTH in config:
            config[ROUTED_WIDTH] = width
        if config.get(keys["expert_sizes"]) is not None:
            config[keys["expert_sizes"]] = [[spec.expert_size] * cut.keep] * spec.num_hidden_layers
    found = model_spec_from_hf(config)
    fewer = replace(moe, num_local_experts=cut.keep)
    if found != replace(spec, moe=fewer, intermediate_size=found.intermediate_size):
        raise UserError(f"'{model.folder}': its config.json says more that follows from the number of experts")
    return config


def cut_tensors(model: MixtureModel, cut: ExpertCut) -> list[tuple[TensorInfo, Blocks]]:
    """Every tensor of the folder behind the cut, in the stored types, and what reads it block by block."""
    rules = rule_set(model.spec, detect_style(model.reader.infos.keys(), model.spec))
    where: dict[str, tuple[str, str, str, int, int | None]] = {}  # template, dims, our name, layer, expert
    for rule in rules.rules:
        for template, dims in rule.hf_templates:
            one_each = "{expert}" in template
            if one_each or EXPERTS in dims.split():
                for layer in cut.kept:
                    for expert in range(model.moe.num_local_experts) if one_each else (None,):
                        name = template.format(layer=layer, expert=expert)
                        where[name] = (template, dims, rule.ms[0], layer, expert)
    found = []
    for name in (name for binding in rules.bindings for name in binding.hf):
        stored = model.reader.infos[name]
        if name not in where:
            found.append((stored, _copied(model.reader, name, stored)))
            continue
        template, dims, ours, layer, expert = where[name]
        kept = cut.kept[layer]
        if expert is None:
            shape = tuple(
                cut.keep if word == EXPERTS else size for word, size in zip(dims.split(), stored.shape, strict=True)
            )
            found.append((replace(stored, shape=shape), _rows(model.reader, stored, cut, layer, ours)))
        elif expert in kept:
            new = template.format(layer=layer, expert=kept.index(expert))
            found.append((replace(stored, name=new), _copied(model.reader, name, stored)))
    return found


def _copied(reader: Reader, name: str, stored: TensorInfo) -> Blocks:
    """The tensor as it lies."""
    step = PlannedTensor(stored, whole(name, stored.shape))

    def blocks() -> Iterator[Array]:
        ((_, parts),) = Plan((step,), (), (), None).stream(reader)
        yield from parts

    return blocks


def _rows(reader: Reader, stored: TensorInfo, cut: ExpertCut, layer: int, ours: str) -> Blocks:
    """The rows that stay, one at a time: of experts that lie fused each is one expert."""

    def blocks() -> Iterator[Array]:
        new = cut.instead(layer, ours)
        if new is not None:
            yield new.astype(stored.dtype)
            return
        for row in cut.rows(layer, ours):
            yield reader.read(stored.name, (slice(row, row + 1),))

    return blocks
