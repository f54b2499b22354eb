# SPDX-License-Identifier: Apache-2.0
"""The YAML of a dense merge, as mergekit's users have it, read strictly: a typo is an error, not a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.layers import dtype_name
from mindformers_ext.formats.dtypes import FLOATS
from mindformers_ext.jobs.merge.references import parse_reference
from mindformers_ext.jobs.merge.templates import TEMPLATES
from mindformers_ext.jobs.merge.values import Setting, parse_settings
from mindformers_ext.jobs.merge.vocab_config import VocabularyWish, parse_vocabulary
from mindformers_ext.surgery.merge.names import name_fault

TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "compat",
)
LEGACY = ("name", "embed_slerp", "input_model_parameters")
MODEL_KEYS, SOURCE_KEYS = ("model", "parameters"), ("model", "layer_range", "parameters")
SLICE_KEYS, MODULE_KEYS = ("sources", "parameters", "base_model", "residual_weight"), ("slices", "models", "parameters")
# what older mergekit did otherwise: key -> values, the default first
COMPAT = {"post_gradient": ("first", "last"), "rescale_mode": ("l1", "density")}

Scope = Mapping[str, Setting]


@dataclass(frozen=True)
class LayerSource:
    """One model of a slice. ``layers`` None: all of them."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Scope = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers that come from the same models."""

    sources: tuple[LayerSource, ...]
    parameters: Scope = field(default_factory=dict)
    base_model: str | None = None


@dataclass(frozen=True)
class MergeConfig:
    """A whole merge. ``from_models``: the file lists models, not slices."""

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None
    parameters: tuple[Scope, ...]  # of the module, then of the top level
    dtype: str | None
    out_dtype: str | None
    tokenizer: VocabularyWish | None
    chat_template: str | None
    compat: Mapping[str, str]
    text: str
    warnings: tuple[str, ...] = ()

    def models(self) -> list[str]:
        """Every model named, in file order, the base last where it is no source."""
        names = [source.model for part in self.slices for source in part.sources]
        names += [part.base_model for part in self.slices if part.base_model]
        return list(dict.fromkeys([*names, *([self.base_model] if self.base_model else [])]))


def read_merge_config(path: Path) -> MergeConfig:
    """The merge that the file describes; every fault of its form is listed in one ``UserError``."""
    raw = load_yaml(path)
    problems = Problems(str(path))
    warnings: list[str] = []
    problems.unknown_keys("the file", (key for key in raw if key not in LEGACY), TOP)
    warnings += [f"key '{key}' has no meaning any more and is left out" for key in raw if key in LEGACY]
    raw, module = _without_module(raw, problems)
    method = raw.get("merge_method")
    fault = name_fault(method)
    if fault:
        problems.add(*fault)
    base = parse_reference(raw.get("base_model"), "base_model", problems) if raw.get("base_model") is not None else None
    config = MergeConfig(
        merge_method=str(method),
        slices=_slices(raw, base, problems),
        base_model=base,
        parameters=(module, parse_settings(raw.get("parameters"), "parameters", problems)),
        dtype=read_dtype(raw.get("dtype"), "dtype", problems),
        out_dtype=read_dtype(raw.get("out_dtype"), "out_dtype", problems),
        tokenizer=parse_vocabulary(raw, problems),
        chat_template=_chat_template(raw.get("chat_template"), problems),
        compat=_compat(raw.get("compat"), problems),
        text=path.read_text(encoding="utf-8"),
        warnings=tuple(warnings),
    )
    problems.raise_if_any()
    return config


def _without_module(raw: dict[str, Any], problems: Problems) -> tuple[dict[str, Any], Scope]:
    """``modules: {default: {...}}`` means the same as its content at the top."""
    if "modules" not in raw:
        return raw, {}
    modules = raw["modules"]
    if not isinstance(modules, Mapping) or list(modules) != ["default"] or not isinstance(modules["default"], Mapping):
        problems.add(f"modules is {modules!r}", "models merged here have one module, called default")
        return raw, {}
    inside = modules["default"]
    problems.unknown_keys("modules.default", map(str, inside), MODULE_KEYS)
    twice = [key for key in ("slices", "models") if key in raw]
    if twice:
        problems.add(f"both modules and {twice[0]} are given", "keep one of them")
    rest = {key: value for key, value in raw.items() if key != "modules"}
    found = {key: inside[key] for key in ("slices", "models") if key in inside}
    return {**rest, **found}, parse_settings(inside.get("parameters"), "modules.default.parameters", problems)


def _slices(raw: Mapping[str, Any], base: str | None, problems: Problems) -> tuple[Slice, ...]:
    given = [key for key in ("models", "slices") if raw.get(key) is not None]
    if len(given) != 1:
        problems.add(f"the file has {' and '.join(given) or 'neither models nor slices'}", "give one of the two")
        return ()
    items = raw[given[0]]
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        problems.add(f"{given[0]} is {items!r}", "write a list with at least one item")
        return ()
    if given == ["slices"]:
        return tuple(_slice(item, f"slices[{place}]", problems) for place, item in enumerate(items))
    sources = [_source(item, f"models[{place}]", MODEL_KEYS, problems) for place, item in enumerate(items)]
    if base is not None and base not in [source.model for source in sources]:
        sources.append(LayerSource(base))
    _no_twins(sources, "models", problems)
    return (Slice(tuple(sources)),)


def _slice(raw: Mapping[str, Any], where: str, problems: Problems) -> Slice:
    problems.unknown_keys(where, map(str, raw), SLICE_KEYS)
    items = raw.get("sources")
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        problems.add(f"{where}.sources is {items!r}", "write a list of {model, layer_range}")
        return Slice(())
    sources = [_source(item, f"{where}.sources[{n}]", SOURCE_KEYS, problems) for n, item in enumerate(items)]
    for number, (source, item) in enumerate(zip(sources, items, strict=True)):
        if "layer_range" not in item:
            problems.add(f"{where}.sources[{number}] ({source.model}) has no layer_range", "write layer_range: [0, 32]")
    _no_twins(sources, where, problems)
    base = raw.get("base_model")
    return Slice(
        tuple(sources),
        parse_settings(raw.get("parameters"), f"{where}.parameters", problems),
        None if base is None else parse_reference(base, f"{where}.base_model", problems),
    )


def _source(raw: Mapping[str, Any], where: str, keys: tuple[str, ...], problems: Problems) -> LayerSource:
    problems.unknown_keys(where, map(str, raw), keys)
    model = parse_reference(raw.get("model"), f"{where}.model", problems)
    layers = _layers(raw["layer_range"], f"{where}.layer_range", problems) if "layer_range" in raw else None
    return LayerSource(model, layers, parse_settings(raw.get("parameters"), f"{where}.parameters", problems))


def _layers(raw: Any, where: str, problems: Problems) -> tuple[int, int] | None:
    good = isinstance(raw, list) and len(raw) == 2 and all(type(item) is int for item in raw)
    if not good:
        problems.add(f"{where} is {raw!r}", "write [first, end] with whole numbers; the end is not included")
        return None
    first, end = raw
    if first < 0 or end < first:
        problems.add(f"{where} is {raw!r}", "layers are counted from 0 and the end is not below the beginning")
        return None
    return first, end


def _no_twins(sources: list[LayerSource], where: str, problems: Problems) -> None:
    names = [source.model for source in sources]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.add(f"'{name}' is listed twice in {where}", "every model of a slice is another one")


def read_dtype(raw: Any, where: str, problems: Problems) -> str | None:
    """The long name of the float type ``raw``, None for None; a problem where it is none."""
    if raw is None:
        return None
    name = dtype_name(raw) or str(raw).removeprefix("torch.")
    if name not in FLOATS:
        problems.add(f"{where} is {raw!r}", f"choose one of {', '.join(FLOATS)}")
        return None
    return name


def _chat_template(raw: Any, problems: Problems) -> str | None:
    if raw is None or raw == "auto" or raw in TEMPLATES or (isinstance(raw, str) and ("{{" in raw or "{%" in raw)):
        return raw
    problems.add(f"chat_template is {raw!r}", f"choose auto or {', '.join(TEMPLATES)}, or write a Jinja template")
    return None


def _compat(raw: Any, problems: Problems) -> dict[str, str]:
    if raw is not None and not isinstance(raw, Mapping):
        problems.add(f"compat is {raw!r}", f"write a mapping with {', '.join(COMPAT)}")
        raw = None
    given = {str(key): value for key, value in (raw or {}).items()}
    problems.unknown_keys("compat", given, COMPAT)
    for key, allowed in COMPAT.items():
        problems.one_of(f"compat.{key}", given.setdefault(key, allowed[0]), allowed)
    return given


def need_slices(config: MergeConfig) -> None:
    """A merge without layers at all is a ``UserError``."""
    if not config.slices:
        raise UserError("nothing is to be merged: the file lists no sources")
