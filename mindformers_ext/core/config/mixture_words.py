# SPDX-License-Identifier: Apache-2.0
"""The words of a data mixture: ``train_dataset.data_loader`` of the type MixtureDataset, and the names of
Sheared-LLaMA's YAMLs for the same (``callbacks.data_loading``, ``eval_interval: 50ba``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.config.ranges import COUNT, PATH, PATHS, RATE, SHARE, TEXT, Kind, is_whole, number, shown
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems

MIXTURE, PLAIN = "MixtureDataset", "MindDataset"
SHARED = ("type", "dataset_dir", "num_samples")  # words of both
PLACE = "train_dataset.data_loader"
SEED_CALLBACK = "data_loading"  # Sheared-LLaMA's
SEED_SECTION = f"callbacks.{SEED_CALLBACK}"
SEED_WORDS = ("dynamic", "set_names", "proportion", "update_type", "target_loss")
_BATCHES = re.compile(r"([1-9][0-9]{0,9})ba")


def _is_numbers(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple)) and bool(values) and all(ANY.fits(item) for item in values)


def _is_files(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and PATHS.fits(v) for k, v in value.items())


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)


def steps_of(value: Any) -> int | None:
    """A number of steps, also as Composer writes it (50ba); None for anything else."""
    if is_whole(value):
        return int(value) if 0 < value < 2**31 else None
    found = _BATCHES.fullmatch(value) if isinstance(value, str) else None
    return int(found[1]) if found else None


ANY = number(float("-inf"))
NUMBERS = Kind("a list of finite numbers, or one per name", _is_numbers)
FILES = Kind("a mapping of names to MindRecord files", _is_files)
WORDS: dict[str, Kind] = {
    "type": TEXT,
    "dataset_dir": PATH,
    "split": TEXT,
    "eval_split": TEXT,
    "domains": FILES,
    "eval_domains": FILES,
    "set_names": Kind("a list of names", _is_names),
    "proportion": NUMBERS,
    "preset": TEXT,
    "update_type": TEXT,
    "target_loss": Kind("a list of numbers, one per name, or a JSON file", lambda v: PATH.fits(v) or _is_numbers(v)),
    "target_loss_from": PATH,
    "eta": number(0, 1e6),
    "smoothing": SHARE,
    "min_weight": SHARE,
    "max_weight": SHARE,
    "min_entropy": RATE,
    "temperature": number(1e-3, 1e6),
    "on_exhausted": TEXT,
    "eval_interval": Kind(
        "a number of steps above 0, or that with ba behind (50ba)", lambda v: steps_of(v) is not None
    ),
    "num_samples": COUNT,
}
Files = tuple[tuple[str, tuple[Path, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """A data mixture as it is written; ``jobs.run.mixture`` looks at its files.

    folder, split, eval_split: of a prepared corpus. ``domains``, ``eval_domains``: else its files by name, and those
    that losses are measured on. ``names``: the order of domains; ``proportions``, ``targets``: in that order or by
    name, the latter also a file; ``target_model``: a model whose losses are the targets. ``interval``: steps of a
    window, 0 for none. ``samples``: rows of one epoch, None = all.
    """

    folder: Path | None = None
    split: str | None = None
    eval_split: str | None = None
    domains: Files = ()
    eval_domains: Files = ()
    names: tuple[str, ...] | None = None
    proportions: tuple[float, ...] | Mapping[str, float] | None = None
    preset: str | None = None
    rule: str | None = None
    targets: tuple[float, ...] | Mapping[str, float] | Path | None = None
    target_model: Path | None = None
    eta: float | None = None
    smoothing: float | None = None
    low: float | None = None
    high: float | None = None
    entropy: float | None = None
    temperature: float | None = None
    on_exhausted: str = "repeat"
    interval: int = 0
    samples: int | None = None


def mixture_from_yaml(loader: Mapping[str, Any], where: str, problems: Problems) -> MixtureSpec | None:
    """The mixture that the section ``where`` describes, None where it is of another type; what is wrong is added to
    ``problems``."""
    if loader.get("type") == PLAIN:
        own = [name for name in loader if name in WORDS and name not in SHARED]
        problems.add_names("words", f"of {where} belong to {MIXTURE}", own, f"set type to it, {PLAIN} has none of them")
    if loader.get("type") != MIXTURE:
        return None
    before = len(problems.lines)
    problems.unknown_keys(f"{where} ({MIXTURE})", loader, WORDS)
    words = {name: value for name, value in loader.items() if value is not None and value != ""}
    for name, kind in WORDS.items():
        if name in words and not kind.fits(words[name]):
            problems.add(f"{where}.{name}={shown(words[name])} is not {kind.words}", "correct it or leave it out")
    if len(problems.lines) > before:
        return None
    targets = words.get("target_loss")
    return MixtureSpec(
        folder=_path(words.get("dataset_dir")),
        split=words.get("split"),
        eval_split=words.get("eval_split"),
        domains=_files(words.get("domains")),
        eval_domains=_files(words.get("eval_domains")),
        names=tuple(words["set_names"]) if "set_names" in words else None,
        proportions=_numbers(words.get("proportion")),
        preset=words.get("preset"),
        rule=words.get("update_type"),
        targets=Path(targets) if isinstance(targets, str) else _numbers(targets),
        target_model=_path(words.get("target_loss_from")),
        **{
            field: float(words[name]) if name in words else None
            for name, field in (
                ("eta", "eta"),
                ("smoothing", "smoothing"),
                ("min_weight", "low"),
                ("max_weight", "high"),
                ("min_entropy", "entropy"),
                ("temperature", "temperature"),
            )
        },
        on_exhausted=words.get("on_exhausted", "repeat"),
        interval=steps_of(words.get("eval_interval")) or 0,
        samples=words.get("num_samples"),
    )


def _path(value: Any) -> Path | None:
    return Path(value) if value else None


def _files(value: Any) -> Files:
    pairs = (value or {}).items()
    return tuple((name, (Path(given),) if isinstance(given, str) else tuple(map(Path, given))) for name, given in pairs)


def _numbers(value: Any) -> tuple[float, ...] | dict[str, float] | None:
    if isinstance(value, Mapping):
        return {str(name): float(item) for name, item in value.items()}
    return None if value is None else tuple(map(float, value))


def with_mixture_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config`` with Sheared-LLaMA's names at the places of ours; the same object where there are none.

    ``callbacks`` may be a mapping, as Composer has it: a name is the type of its callback. ``dynamic: False`` is
    ``update_type: constant``.

    Raises:
        UserError: such names without a data mixture, or one thing said twice in two ways.
    """
    callbacks = config.get("callbacks")
    if isinstance(callbacks, Mapping):
        callbacks = [
            {"type": name, **(words or {})} if _is_section(words) else words for name, words in callbacks.items()
        ]
    given = (
        [item for item in callbacks or () if isinstance(item, Mapping) and item.get("type") == SEED_CALLBACK]
        if isinstance(callbacks, list)
        else []
    )
    interval = config.get("eval_interval")
    if not given and interval is None and callbacks is config.get("callbacks"):
        return config
    result = {key: value for key, value in config.items() if key != "eval_interval"}
    if callbacks is not None:
        result["callbacks"] = [item for item in callbacks if item not in given]
    problems = Problems("the configuration")
    words: dict[str, Any] = {} if interval is None else {"eval_interval": interval}
    for item in given:
        problems.unknown_keys(f"callbacks.{SEED_CALLBACK}", item, ("type", *SEED_WORDS))
        words |= {name: item[name] for name in SEED_WORDS if item.get(name) is not None}
    dynamic = words.pop("dynamic", None)
    if dynamic is not None and not isinstance(dynamic, bool):
        problems.add(f"callbacks.{SEED_CALLBACK}.dynamic={shown(dynamic)} is not True or False", "correct it")
    loader = section_at(config, PLACE)
    if dynamic is False:  # whatever else is said
        words["update_type"] = "constant"
    elif dynamic and "update_type" not in words and not loader.get("update_type"):
        words["update_type"] = "doremi"
    if words and loader.get("type") != MIXTURE:
        named = f"callbacks.{SEED_CALLBACK}" if given else "eval_interval"
        problems.add(f"{named} belongs to a data mixture", f"set {PLACE}.type to {MIXTURE}, or remove it")
    for name, value in words.items():
        if loader.get(name) not in (None, value) and not (name == "update_type" and dynamic is False):
            problems.add(f"{PLACE}.{name}={shown(loader[name])}, elsewhere in the file {shown(value)}", "say it once")
    problems.raise_if_any()
    data = config.get("train_dataset")
    if words and isinstance(data, Mapping):
        result["train_dataset"] = {**data, "data_loader": {**loader, **words}}
    return result


def _is_section(words: Any) -> bool:
    return words is None or isinstance(words, Mapping)
