# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face ``config.json`` says of positions: rotary embedding and sliding windows, in every spelling.

transformers 4 has ``rope_theta`` and ``rope_scaling`` at the top, and without them silently takes its own defaults;
transformers 5 has both in ``rope_parameters``. Files written here have both spellings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mindformers_ext.core.config.rope_words import scaling_from
from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import FAMILIES, Family
from mindformers_ext.core.rope import ROPE_TYPES, RopeScaling
from mindformers_ext.core.spec import ModelSpec

ROPE_KEYS = ("rope_scaling", "rope_parameters")
LAYER_TYPES = "layer_types"
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", LAYER_TYPES)
MAX_WINDOW_LAYERS = 28  # transformers' default of max_window_layers
DEFAULT_THETA = 10000.0
FULL, WINDOWED = "full_attention", "sliding_attention"
FIELDS = frozenset(item.name for item in fields(RopeScaling))  # files carry words of other methods along
_NAMES = ("rope_type", "type")  # of the method; the second is older


def read_rope(config: Mapping[str, Any], theta: float, problems: Problems) -> tuple[float, RopeScaling | None]:
    """Base and scaling; ``theta`` is what stands at the top, or the default.

    Problems are recorded for methods that are not built, unknown words, and two spellings that differ.
    """
    found = {key: _words(key, config.get(key), problems) for key in ROPE_KEYS}
    top, nested = (found[key] for key in ROPE_KEYS)
    inner = nested.pop("rope_theta", None)
    if inner is not None:
        inner = read_value("rope_parameters.rope_theta", inner, "float", theta, problems)
        if config.get("rope_theta") is not None and inner != theta:
            problems.add(f"rope_theta={theta} and rope_parameters.rope_theta={inner} differ", "keep one")
        theta = float(inner)
    top.pop("rope_theta", None)
    scalings = {key: _scaling(key, words, problems) for key, words in zip(ROPE_KEYS, (top, nested), strict=True)}
    given = [scalings[key] for key in ROPE_KEYS if config.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        problems.add("rope_scaling and rope_parameters name different methods", "keep one of them")
    return theta, next((scaling for scaling in given if scaling is not None), None)


def _words(key: str, value: Any, problems: Problems) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.add(f"{key}={value!r}", "a mapping with rope_type is expected")
        return {}
    if value.get("partial_rotary_factor") in (1, 1.0):
        value = {name: item for name, item in value.items() if name != "partial_rotary_factor"}
    return dict(value)


def _scaling(key: str, words: dict[str, Any], problems: Problems) -> RopeScaling | None:
    """The method that ``words`` name; None for none."""
    kinds = [words.pop(name) for name in _NAMES if name in words]
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in (*ROPE_TYPES, "default"):
        known = ", ".join(("default", *ROPE_TYPES))
        problems.add(f"{key}: rope_type={kind!r} is not built", f"these are: {known}")
        return None
    if kind == "default":
        if words:
            problems.add(f"{key} without rope_type has {', '.join(map(str, words))}", "name the method as rope_type")
        return None
    return scaling_from(kind, words, key, problems, ignored=FIELDS)


def read_window(
    config: Mapping[str, Any], row: Family, layers: int, positions: int, problems: Problems
) -> tuple[int | None, tuple[int, ...]]:
    """The window, None where no position is beyond it, and the layers that see everything all the same."""
    window = read_value("sliding_window", config.get("sliding_window", row.window), "int", None, problems)
    switch = row.window_switch and read_value(row.window_switch, config.get(row.window_switch), "bool", False, problems)
    if row.window_switch and not switch:
        window = None
    if not row.windowed:
        if switch and window is not None:
            problems.add(f"{row.window_switch}={switch} of a {row.name} is not built", "only False is")
        _check_types(config, None, layers, problems)
        return None, ()
    full = () if window is None or not row.mixes_windows else _full_layers(config, layers, problems)
    if not row.mixes_windows or window is None:
        _check_types(config, window, layers, problems)
    if window is None or window >= positions or len(full) == layers:
        return None, ()
    return window, full


def _full_layers(config: Mapping[str, Any], layers: int, problems: Problems) -> tuple[int, ...]:
    types = config.get(LAYER_TYPES)
    if types is None:
        first = read_value("max_window_layers", config.get("max_window_layers"), "int", MAX_WINDOW_LAYERS, problems)
        return tuple(range(min(max(first, 0), layers)))
    if not _are_types(types) or len(types) != layers:
        problems.add(f"layer_types={types!r}", f"{layers} of {FULL}, {WINDOWED} are expected, one a layer")
        return ()
    return tuple(index for index, kind in enumerate(types) if kind == FULL)


def _check_types(config: Mapping[str, Any], window: int | None, layers: int, problems: Problems) -> None:
    """``layer_types`` where all layers are alike: those that say so."""
    types = config.get(LAYER_TYPES)
    if types is None:
        return
    wanted = FULL if window is None else WINDOWED
    if not _are_types(types) or set(types) - {wanted}:
        problems.add(f"layer_types={types!r} is not built here", f"only {wanted} in every layer is")


def _are_types(types: Any) -> bool:
    return isinstance(types, (list, tuple)) and all(
        isinstance(kind, str) and kind in (FULL, WINDOWED) for kind in types
    )


def written_attention(spec: ModelSpec, row: Family) -> dict[str, Any]:
    """The keys of ``config.json`` about positions."""
    scaling = spec.rope_scaling.said() if spec.rope_scaling else {}
    result: dict[str, Any] = {
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": spec.rope_theta},
    }
    if row.windowed:
        result["sliding_window"] = spec.sliding_window
    if row.window_switch:
        result[row.window_switch] = spec.sliding_window is not None
    if row.mixes_windows and spec.sliding_window is not None:
        full = spec.full_attention_layers
        result[LAYER_TYPES] = [FULL if i in full else WINDOWED for i in range(spec.num_hidden_layers)]
    return result


def with_both_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the rotary settings in both spellings: transformers 4 reads rope_theta and rope_scaling at the
    top and silently takes its own default without them, transformers 5 reads rope_parameters."""
    result = dict(config)
    kind = str(config.get("model_type"))
    nested = config.get("rope_parameters")
    if isinstance(nested, Mapping):
        theta = nested.get("rope_theta", config.get("rope_theta"))
        scaling = {key: value for key, value in nested.items() if key != "rope_theta"}
        rope = scaling.get("rope_type", scaling.get("type", "default"))
    else:
        theta = config.get("rope_theta")
        given = config.get("rope_scaling")
        scaling = dict(given) if isinstance(given, Mapping) else {}
        rope = scaling.get("rope_type", scaling.get("type", "default"))
    theta = (FAMILIES[kind].defaults["rope_theta"] if kind in FAMILIES else DEFAULT_THETA) if theta is None else theta
    result["rope_theta"] = theta
    result["rope_scaling"] = None if rope == "default" else scaling
    result["rope_parameters"] = {**scaling, "rope_theta": theta, "rope_type": rope}
    return result
