# SPDX-License-Identifier: Apache-2.0
"""``recompute_config``: which layers, or parts of them, forget their activations after the forward pass and compute
them again (Chen et al. 2016, section 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.core.stages import layer_stage

WHERE = "recompute_config"
WHOLE = ("attention", "feed_forward")  # the parts with products and messages; together with the norms a layer
# Parts of a layer, and what MindFormers' configurations call them in ``select_recompute``. ``swiglu`` is the gated
# product inside feed_forward; silu is computed again in any case.
PARTS: dict[str, tuple[str, ...]] = {
    "attention_norm": ("attention_norm", "attention_norm.norm"),
    "attention": ("attention",),
    "ffn_norm": ("ffn_norm", "ffn_norm.norm"),
    "feed_forward": ("feed_forward",),
    "swiglu": ("feed_forward.mul", "feed_forward.w1.activation", "feed_forward.w1.activation.silu"),
}
# MindFormers' guides name these beside the others; they keep nothing here.
KEEP_NOTHING = ("feed_forward.reshape", "feed_forward.w1.reshape", "feed_forward.w2.reshape")
BROKEN = frozenset(("attention_norm", "attention", "swiglu"))  # MindSpore 2.9 does not compile a layer with all three
SELECTED = "swiglu"  # what ``select_recompute: True`` means, as in MindFormers


@dataclass(frozen=True)
class RecomputeSpec:
    """``layers``: indices of the layers that are computed again.

    ``exchanges``: also repeat what they exchange with other devices (``mp_comm_recompute``); otherwise those results
    are kept. ``cut_inputs``: keep each layer's input cut over model_parallel (``recompute_slice_activation``).
    ``selected``: names of ``PARTS``, each with the layers whose part is computed again (``select_recompute``).
    """

    layers: frozenset[int] = frozenset()
    exchanges: bool = True
    cut_inputs: bool = False
    selected: tuple[tuple[str, frozenset[int]], ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is computed again."""
        return bool(self.layers) or any(layers for _, layers in self.selected)

    def parts_of(self, layer: int) -> frozenset[str]:
        """The parts of ``layer`` that are computed again by themselves: none of a layer that is so as a whole."""
        if layer in self.layers:
            return frozenset()
        found = frozenset(part for part, layers in self.selected if layer in layers)
        return found - {"swiglu"} if "feed_forward" in found else found

    def for_every_layer(self, layers: int) -> RecomputeSpec:
        """The same for all of a network's layers, where some are named now."""
        every = frozenset(range(layers))
        selected = tuple((part, every) for part, some in self.selected if some)
        if {part for part, _ in selected} >= BROKEN:
            selected = tuple(item for item in selected if item[0] != "attention_norm")
        return replace(self, layers=every if self.layers else frozenset(), selected=selected)


def recompute_from_yaml(config: Mapping[str, Any], spec: NetworkSpec) -> RecomputeSpec:
    """Read ``recompute_config`` for the network ``spec``; without it nothing is computed again.

    ``recompute`` is True, False, or a list with one entry per pipeline stage: so many of its layers from its first,
    or True or False. Stages behind the list's end compute nothing again. ``select_recompute`` is the same for
    ``SELECTED``, or a list of names, or one such value for each name; a layer that is computed again as a whole counts,
    and has no parts.

    Raises:
        UserError: a value of the wrong kind, a list longer than the pipeline, a name that is no part, or parts that
            cannot be computed again alone or together.
    """
    words = config.get(WHERE) or {}
    problems = Problems(WHERE)
    if not isinstance(words, Mapping):
        problems.add(f"{WHERE}={words!r} is no section", "write keys below it, such as recompute: True")
        problems.raise_if_any()
    layers, stages, moe = spec.model.num_hidden_layers, spec.parallel.pipeline_stage, spec.model.moe
    exchanges = read_value(f"{WHERE}.mp_comm_recompute", words.get("mp_comm_recompute", True), "bool", True, problems)
    cut = read_value(
        f"{WHERE}.recompute_slice_activation", words.get("recompute_slice_activation", False), "bool", False, problems
    )
    counts = _counts(f"{WHERE}.recompute", words.get("recompute", False), layers, stages, problems)
    selected = _selected(words.get("select_recompute"), layers, stages, problems)

    def chosen(counts: list[int]) -> frozenset[int]:
        return _first_layers(counts, layers, stages, spec.parallel.pp_interleave_num)

    found = RecomputeSpec(
        chosen(counts),
        bool(exchanges),
        bool(cut),
        tuple((part, chosen(selected[part])) for part in PARTS if part in selected),
    )
    of_each = [found.parts_of(layer) for layer in range(layers)]
    if moe is not None and moe.use_gmm and any("swiglu" in parts for parts in of_each):
        problems.add(
            f"{WHERE}.select_recompute names the gated product, which use_gmm makes a part of its experts",
            "select feed_forward, or leave use_gmm off",
        )
    if any(parts >= BROKEN for parts in of_each):
        problems.add(
            f"{WHERE}.select_recompute names attention, its norm and the gated product of one layer, which "
            "MindSpore does not compile",
            "leave attention_norm out",
        )
    problems.raise_if_any()
    return found


def recompute_words(found: RecomputeSpec, spec: NetworkSpec) -> dict[str, Any]:
    """``recompute`` and ``select_recompute`` with which ``recompute_from_yaml`` reads ``found`` for ``spec``.

    ``found``: of every stage its first layers, and parts of every layer or none.
    """
    counts, sizes = [0] * spec.parallel.pipeline_stage, [0] * spec.parallel.pipeline_stage
    for layer in range(spec.model.num_hidden_layers):
        sizes[spec.layer_stage(layer)] += 1
        counts[spec.layer_stage(layer)] += layer in found.layers
    names = [re.escape(PARTS[part][0]) for part, layers in found.selected if layers]
    return {
        "recompute": counts == sizes or (counts if any(counts) else False),
        "select_recompute": True if names == [re.escape(PARTS[SELECTED][0])] else names or False,
    }


def recompute_asked(words: object, problems: Problems) -> tuple[bool, bool]:
    """Whether the section ``words`` asks for any whole layer, and for any part, for an engine without a pipeline."""
    if not isinstance(words, Mapping):
        words = {"recompute": words}
    whole, parts = words.get("recompute"), words.get("select_recompute")
    lists = [whole, parts, *(parts.values() if isinstance(parts, Mapping) else ())]
    stages = max(len(value) if isinstance(value, (list, tuple)) else 1 for value in lists)
    layers = _counts(f"{WHERE}.recompute", whole, 1, stages, problems)
    return any(layers), any(map(any, _selected(parts, 1, stages, problems).values()))


def names_without_effect(config: Mapping[str, Any]) -> list[str]:
    """What ``select_recompute`` names although it keeps nothing here."""
    words = config.get(WHERE)
    names = words.get("select_recompute") if isinstance(words, Mapping) else None
    if not isinstance(names, (Mapping, list, tuple)):
        return []
    return [name for name in names if isinstance(name, str) and name.replace("\\.", ".") in KEEP_NOTHING]


def _first_layers(counts: list[int], layers: int, stages: int, parts: int) -> frozenset[int]:
    """So many layers of each stage from its first."""
    found, seen = set(), [0] * stages
    for layer in range(layers):
        stage = layer_stage(layer, layers, stages, parts)
        if seen[stage] < counts[stage]:
            found.add(layer)
        seen[stage] += 1
    return frozenset(found)


def _selected(value: object, layers: int, stages: int, problems: Problems) -> dict[str, list[int]]:
    """Layers per stage for each part that ``select_recompute`` names."""
    key = f"{WHERE}.select_recompute"
    if isinstance(value, Mapping):
        asked = dict(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        asked = dict.fromkeys(value, True)
    elif isinstance(value, str):
        problems.add(f"{key}={value!r} is no list", f"write True, or a list of names: [{value}]")
        return {}
    else:
        asked = {PARTS[SELECTED][0]: value} if value not in (None, False, [], ()) else {}
    found: dict[str, list[int]] = {}
    for name, amount in asked.items():
        counts = _counts(f"{key}: {name}" if isinstance(value, Mapping) else key, amount, layers, stages, problems)
        for part in _parts_named(str(name), problems):
            found[part] = list(map(max, counts, found.get(part, counts)))
    return found


def _parts_named(name: str, problems: Problems) -> list[str]:
    """MindFormers' names are regular expressions of words between escaped dots. Here every dot parts words, and ``.*``
    stands for any letters of the first."""
    words = name.replace(".*", "*").replace("\\.", ".").split(".")
    known = {alias: part for part, aliases in PARTS.items() for alias in aliases} | dict.fromkeys(KEEP_NOTHING, "")
    if not re.fullmatch(r"[\w*]*(\.\w+)*", ".".join(words)):
        problems.add(
            f"{WHERE}.select_recompute: {name!r} is not understood",
            f"'.*' may stand in the first word alone; choose among {', '.join(known)}",
        )
        return []
    alike = [
        alias for alias in known if alias.split(".")[1:] == words[1:] and fnmatchcase(alias.split(".")[0], words[0])
    ]
    if not alike:
        problems.add(
            f"{WHERE}.select_recompute: {name!r} is no part of a layer here", f"choose among {', '.join(known)}"
        )
    return sorted({known[alias] for alias in alike} - {""})


def _counts(key: str, value: object, layers: int, stages: int, problems: Problems) -> list[int]:
    """Layers to compute again per stage."""
    advice = "write True, False, or one number of layers per pipeline stage, for example [3, 2]"
    if value is None or isinstance(value, bool):
        return [layers if value else 0] * stages
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, int) and item >= 0 for item in value):
        problems.add(f"{key}={value!r} is not understood", advice)
        return [0] * stages
    if len(value) > stages:
        problems.add(f"{key}={list(value)} has {len(value)} entries, pipeline_stage={stages}", advice)
        return [0] * stages
    counts = [layers if item is True else int(item) for item in value]
    return counts + [0] * (stages - len(counts))
