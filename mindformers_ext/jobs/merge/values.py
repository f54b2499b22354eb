# SPDX-License-Identifier: Apache-2.0
"""Values of merge parameters as users write them: a number, a list over the layers, or conditions on tensor names.

``t: 0.5``; ``t: [0, 0.5, 1]`` (a gradient: its end points lie at the first and the last layer of the slice);
``t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]`` (the first condition whose filter is a part of the tensor's
name; no filter fits every name).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from mindformers_ext.core.errors import Problems

Scalar = float | bool
CONDITION_KEYS = ("filter", "value")


@dataclass(frozen=True)
class Condition:
    """``values`` (one: a constant) for tensors whose name contains ``filter``; None fits all."""

    filter: str | None
    values: tuple[Scalar, ...]


Setting = tuple[Condition, ...]
Settings = Mapping[str, Setting]


def parse_settings(raw: Any, where: str, problems: Problems) -> dict[str, Setting]:
    """The ``parameters`` mapping ``raw`` found at ``where``; faults go to ``problems``."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        problems.add(f"{where} is {raw!r}", "write a mapping of parameter names to values")
        return {}
    return {str(name): parse_setting(value, f"{where}.{name}", problems) for name, value in raw.items()}


def parse_setting(raw: Any, where: str, problems: Problems) -> Setting:
    """One parameter's value in any of the three forms."""
    if isinstance(raw, Mapping):
        return (_condition(raw, where, problems),)
    if isinstance(raw, list) and raw and all(isinstance(item, Mapping) for item in raw):
        return tuple(_condition(item, f"{where}[{place}]", problems) for place, item in enumerate(raw))
    return (Condition(None, _values(raw, where, problems)),)


def _condition(raw: Mapping[Any, Any], where: str, problems: Problems) -> Condition:
    problems.unknown_keys(where, map(str, raw), CONDITION_KEYS)
    if "value" not in raw:
        problems.add(f"{where} has no value", "write {filter: part_of_a_name, value: number}")
        return Condition(None, (0.0,))
    given = raw.get("filter")
    if given is not None and not isinstance(given, str):
        problems.add(f"{where}.filter is {given!r}", "write a part of tensor names, for example self_attn")
        given = None
    return Condition(None if given in (None, "*") else given, _values(raw["value"], f"{where}.value", problems))


def _values(raw: Any, where: str, problems: Problems) -> tuple[Scalar, ...]:
    items = raw if isinstance(raw, list) else [raw]
    found = [_scalar(item) for item in items]
    if not items or any(value is None for value in found):
        problems.add(f"{where} is {raw!r}", "write a number, true or false, a list of them, or {filter, value} items")
        return (0.0,)
    kinds = {isinstance(value, bool) for value in found}
    if len(kinds) > 1:
        problems.add(f"{where} mixes numbers with true and false", "use one kind")
    return tuple(value for value in found if value is not None)


def _scalar(raw: Any) -> Scalar | None:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, int | float):
        return float(raw)
    if isinstance(raw, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(raw)
        except ValueError:
            return None
    return None


def lookup(scopes: Sequence[tuple[Settings, str]], name: str, t: float) -> Scalar | None:
    """The value of parameter ``name``: from the first of ``scopes`` that has one, None where none has.

    A scope is the settings and the tensor name that its filters see. ``t`` in [0, 1] is the place in the gradient.
    """
    for settings, tensor in scopes:
        for condition in settings.get(name, ()):
            if condition.filter is None or condition.filter in tensor:
                return at(condition.values, t)
    return None


def at(values: Sequence[Scalar], t: float) -> Scalar:
    """The value of a gradient at ``t``: straight between numbers, the left one of true and false."""
    place = t * (len(values) - 1)
    left = floor(place)
    if isinstance(values[left], bool):
        return values[left]
    share = place - left
    return (1 - share) * values[left] + share * values[min(left + 1, len(values) - 1)]


def numbers_of(setting: Setting) -> list[Scalar]:
    """Every number that the setting can give."""
    return [value for condition in setting for value in condition.values]
