# SPDX-License-Identifier: Apache-2.0
"""The mapping between Hugging Face's and MindSpore's tensors, as data.

A ``Rule`` names tensors by templates with ``{layer}`` and ``{expert}``; a ``RuleSet`` is a table of rules at the sizes
of one model. Planning a conversion checks totality before any data is read: every source is used by one rule or
declared ignored, every target is filled once, every shape fits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from mindformers_ext.core.parameters import shape_of, size_letters
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.weights.transforms import Identity, Transform
from mindformers_ext.weights.views import Shape, View, crop, pad, whole


@dataclass(frozen=True)
class Rule:
    """Hugging Face template(s) -> MindSpore template(s).

    ``hf`` may hold ``{layer}`` and, when the transform joins one tensor per expert, ``{expert}`` or, of shared ones,
    ``{shared}``, of attention's, ``{group}``; several templates are in the transform's order. ``dims`` is the shape of
    each Hugging Face tensor in size letters (``core.parameters``, "E 2F D"); "HP" is a product, "2M" twice M.
    ``layers``: all, or those alone whose feed-forward is dense or a mixture.
    """

    hf: str | tuple[str, ...]
    ms: tuple[str, ...]
    dims: str | tuple[str, ...]
    transform: Transform = field(default_factory=Identity)
    layers: str = "all"

    @property
    def hf_templates(self) -> tuple[tuple[str, str], ...]:
        """(template, dims) of each Hugging Face name."""
        names = (self.hf,) if isinstance(self.hf, str) else self.hf
        dims = (self.dims,) if isinstance(self.dims, str) else self.dims
        return tuple(zip(names, dims, strict=True))

    @property
    def per_layer(self) -> bool:
        """Whether the rule repeats for every layer."""
        return "{layer}" in self.hf_templates[0][0]


@dataclass(frozen=True)
class Extras:
    """What one side's file may hold besides the weights.

    ``ignored``: regular expressions (full match) with the reason. ``copies``: (name, original): a second
    name of a tensor (tied head); accepted when its data equals the original's, and never written. ``kept``: those of
    the ignored that another layout of the same side holds too.
    """

    ignored: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()

    def reason_to_ignore(self, name: str) -> str | None:
        """Why ``name`` may stay behind, or None."""
        return next((reason for pattern, reason in self.ignored if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Binding:
    """One rule at concrete names and shapes: ``hf`` and ``ms`` map name -> shape, in the transform's order.

    ``full``: shapes of the Hugging Face tensors as the transform has them, where narrower experts are padded.
    """

    hf: Mapping[str, Shape]
    ms: Mapping[str, Shape]
    transform: Transform
    full: tuple[Shape, ...]

    def ms_views(self, hf: Mapping[str, View]) -> dict[str, View]:
        """The MindSpore tensors as views, from views of the Hugging Face tensors."""
        given = [pad(hf[name], shape) for name, shape in zip(self.hf, self.full, strict=True)]
        return dict(zip(self.ms, self.transform.to_ms(given), strict=True))

    def hf_views(self) -> dict[str, View]:
        """The Hugging Face tensors as views of stored MindSpore tensors."""
        stored = [whole(name, shape) for name, shape in self.ms.items()]
        found = self.transform.to_hf(stored, self.full)
        return {name: crop(view, shape) for (name, shape), view in zip(self.hf.items(), found, strict=True)}


@dataclass(frozen=True)
class RuleSet:
    """A table of rules at one model's sizes. Two rules for one name are a mistake in the table: ``ValueError``."""

    rules: tuple[Rule, ...]
    spec: ModelSpec
    hf_extras: Extras = Extras()
    ms_extras: Extras = Extras()

    def __post_init__(self) -> None:
        """Build once, so that a wrong table fails here."""
        for side, names in (
            ("Hugging Face", [name for binding in self.bindings for name in binding.hf]),
            ("MindSpore", [name for binding in self.bindings for name in binding.ms]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"the table has two rules for the {side} name(s) {', '.join(twice)}")

    @cached_property
    def bindings(self) -> tuple[Binding, ...]:
        """Every rule at every layer, in the model's order (layers by number)."""
        return tuple(self._expand())

    def _expand(self) -> Iterable[Binding]:
        sizes = size_letters(self.spec)
        kinds = ["mixture" if self.spec.layer(i).moe else "dense" for i in range(self.spec.num_hidden_layers)]
        for per_layer, group in groupby(self.rules, key=lambda rule: rule.per_layer):
            rules = tuple(group)
            for layer in range(self.spec.num_hidden_layers if per_layer else 1):
                fitting = (rule for rule in rules if not per_layer or rule.layers in ("all", kinds[layer]))
                yield from (bind(rule, layer, sizes, self._widths(layer) if per_layer else {}) for rule in fitting)

    def _widths(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of experts that are not alike, by their letter."""
        moe = self.spec.moe
        found = {"M": moe.expert_sizes[layer]} if moe and moe.expert_sizes else {}
        if moe and moe.shared_expert and moe.shared_expert.expert_sizes:
            found["S"] = moe.shared_expert.sizes_of(layer)
        return found


# What is numbered in a template: the letters of how many there are and of their width, and whether narrower ones are
# held as wide as the widest.
NUMBERED = {"expert": ("E", "M", True), "shared": ("R", "S", False), "group": ("A", "", False)}


def bind(
    rule: Rule, layer: int, sizes: Mapping[str, int], widths: Mapping[str, tuple[int, ...]] | None = None
) -> Binding:
    """``rule`` at one layer: concrete names and shapes of both sides; ``widths``: of experts that are not alike."""
    listed: list[tuple[str, Shape]] = []
    full: list[Shape] = []
    for template, dims in rule.hf_templates:
        word = next((word for word in NUMBERED if f"{{{word}}}" in template), None)
        count, letter, padded = NUMBERED[word] if word else ("", "", True)
        for number in range(sizes[count] if word else 1):
            own = {**sizes, letter: widths[letter][number]} if widths and letter in widths else sizes
            numbers = {word: number} if word else {}
            listed.append((template.format(layer=layer, **numbers), shape_of(dims, own)))
            full.append(shape_of(dims, sizes if padded else own))
    made = [
        view.shape
        for view in rule.transform.to_ms([whole(name, shape) for (name, _), shape in zip(listed, full, strict=True)])
    ]
    names = [template.format(layer=layer) for template in rule.ms]
    if len(names) != len(made):
        raise ValueError(f"rule {rule.hf}: {type(rule.transform).__name__} makes {len(made)} tensors, named {names}")
    hf, ms = dict(listed), dict(zip(names, made, strict=True))
    if len(hf) != len(listed) or len(ms) != len(made):
        raise ValueError(f"rule {rule.hf} -> {rule.ms} gives one name to two tensors")
    return Binding(hf, ms, rule.transform, tuple(full))
