# SPDX-License-Identifier: Apache-2.0
"""The data mixture of a run, opened: its domains' files, where its proportions begin, and how they move."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.config.mixture_words import MixtureSpec
from mindformers_ext.core.config.ranges import as_number
from mindformers_ext.core.errors import Problems, UserError, listed, nearest
from mindformers_ext.core.json_text import read_json
from mindformers_ext.data.domains.manifest import EVAL, NAME, NAMES, read_manifest, split_files
from mindformers_ext.data.mixture.bounds import Bounds
from mindformers_ext.data.mixture.presets import PRESETS, Preset
from mindformers_ext.data.mixture.rules import ALIASES, RULES, Settings, start
from mindformers_ext.data.mixture.schedule import ON_EXHAUSTED
from mindformers_ext.data.mixture.state import LARGEST, Domain, MixtureState
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.jobs.run.dataset import record_files

Floats = npt.NDArray[np.float64]
ROUNDED, OFF = 1e-9, 1e-3  # from 1, of proportions: said, refused
TARGETS = "target_loss"  # in a file: losses by name
# words that only some rules obey: which ones
OBEYED: dict[str, tuple[str, ...]] = {
    "eta": tuple(name for name, rule in RULES.items() if rule.moves),
    "smoothing": tuple(name for name, rule in RULES.items() if rule.moves),
    "target_loss": tuple(name for name, rule in RULES.items() if rule.moves),
    "target_loss_from": tuple(name for name, rule in RULES.items() if rule.moves),
    "proportion": tuple(name for name, rule in RULES.items() if rule.given),
    "temperature": ("temperature",),
}


@dataclass(frozen=True)
class Mixture:
    """A checked data mixture of n domains.

    files, evaluated: of each domain, to train on and to measure losses on (empty where none are measured).
    proportions: of the first window (n). ``targets``: (n), None where no rule asks for them or ``target_model`` has to
    be measured. ``interval``: steps of a window, 0 for none. ``samples``: rows of an epoch. ``notes``: for the log.
    """

    domains: tuple[Domain, ...]
    files: tuple[tuple[Path, ...], ...]
    evaluated: tuple[tuple[Path, ...], ...]
    settings: Settings
    proportions: Floats
    targets: Floats | None
    target_model: Path | None
    interval: int
    on_exhausted: str
    samples: int
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(domain.name for domain in self.domains)

    def state(self, seed: int, batch: int) -> MixtureState:
        """Before the first step.

        Raises:
            UserError: so many domains that a checkpoint could not hold where they stand.
        """
        shares = tuple(self.proportions.tolist())
        state = MixtureState(seed, batch, self.interval, self.domains, shares, (0,) * len(shares), 0, ((0, shares),))
        if len(state.to_json()) > LARGEST * 3 // 4:  # numbers grow
            raise UserError(
                f"{len(shares)} domains with these names are too many for one mixture: join some, or shorten names"
            )
        return state


def open_mixture(spec: MixtureSpec, section: str = "train_dataset.data_loader") -> Mixture:
    """Look at everything that ``spec`` names; rows are counted, and a few are read for the fingerprints.

    Raises:
        UserError: files that are not there, names that do not fit each other, numbers that are no proportions, ...
    """
    problems, notes = Problems(section), list[str]()
    rule = _choices(spec, problems)
    held, measured = _files(spec, section)
    names = _names(spec, tuple(held), problems, notes)
    problems.raise_if_any()
    settings = _settings(spec, rule, len(names), problems, notes)
    given = _given(spec, names, problems, notes) if RULES[rule].given else None
    targets = _targets(spec, names, problems, notes) if settings.moves else None
    _check_measured(spec, settings, names, measured, problems)
    _check_apart(names, held, measured if spec.interval else {}, problems, notes)
    problems.raise_if_any()
    domains = tuple(Domain(name, held[name].rows, held[name].mark) for name in names)
    empty = [name for name, domain in zip(names, domains, strict=True) if not domain.rows]
    problems.add_names("domains", "have no row to train on", empty, "give each data, or leave it out of set_names")
    problems.raise_if_any()
    rows = np.array([domain.rows for domain in domains], np.float64)
    free = start(Settings(rule, temperature=settings.temperature), rows, given)
    proportions = start(settings, rows, given)
    if not settings.bounds.hold(free):
        notes.append(f"the proportions at the start become {_shown(names, proportions)}: the nearest within the bounds")
    return Mixture(
        domains,
        tuple(held[name].paths for name in names),
        tuple(measured[name].paths for name in names) if spec.interval else (),
        settings,
        proportions,
        targets,
        spec.target_model if settings.moves else None,
        spec.interval,
        spec.on_exhausted,
        spec.samples or int(rows.sum()),
        tuple(notes),
    )


@dataclass(frozen=True)
class _Records:
    """Files of one domain, their rows together, and what names them."""

    paths: tuple[Path, ...]
    rows: int
    mark: str


def _choices(spec: MixtureSpec, problems: Problems) -> str:
    """The rule, and whether the other words out of a list are in it."""
    named = spec.rule or "constant"
    rule = ALIASES.get(named, named)
    if rule not in RULES:
        known = (*RULES, *ALIASES)
        problems.add(f"update_type={named!r} is unknown", f"{nearest(named, known)} Known: {', '.join(known)}")
        rule = "constant"
    problems.one_of("on_exhausted", spec.on_exhausted, ON_EXHAUSTED)
    if spec.preset is not None:
        problems.one_of("preset", spec.preset, tuple(PRESETS))
    if (spec.folder is None) == (not spec.domains):
        problems.add("one of dataset_dir (a prepared folder) and domains is needed", "give one of them")
    if spec.folder is None and (spec.split or spec.eval_split):
        problems.add("split and eval_split belong to dataset_dir", "with domains, give eval_domains")
    if spec.folder is not None and spec.eval_domains:
        problems.add("eval_domains belongs to domains", "with dataset_dir, give eval_split")
    if spec.folder is not None and not spec.split:
        problems.add("dataset_dir without split", "give split: for_prune or for_ft")
    if spec.targets is not None and spec.target_model is not None:
        problems.add("target_loss and target_loss_from are both given", "keep one of them")
    problems.raise_if_any()
    return rule


def _files(spec: MixtureSpec, section: str) -> tuple[dict[str, _Records], dict[str, _Records]]:
    """Records by domain, to train on and to measure losses on."""
    if spec.folder is None:
        read = [
            {name: _marked(record_files(paths, f"{section}.{word}.{name}")) for name, paths in files}
            for word, files in (("domains", spec.domains), ("eval_domains", spec.eval_domains))
        ]
        return read[0], read[1]
    manifest = read_manifest(spec.folder)
    found = []
    for split in (spec.split or "", *((spec.eval_split or EVAL,) if spec.interval else ())):
        paths = split_files(manifest, split)
        found.append(
            {
                name: _Records(paths[name], part.rows, _digest([vars(file) for file in part.files]))
                for name, part in manifest.splits[split].items()
            }
        )
    return found[0], found[-1]


def _marked(paths: Sequence[Path]) -> _Records:
    """Rows and fingerprint of files without a manifest: of names, sizes, rows, and the first, middle and last row."""
    marks, rows = list[Any](), 0
    for path in paths:
        with closing(MindRecordFile(path)) as file:
            count = len(file)
            looked_at = sorted({0, count // 2, count - 1}) if count else []
            hashes = [sha256(b"".join(a.tobytes() for a in file.read(row, file.fields))) for row in looked_at]
        marks.append([path.name, path.stat().st_size, count, [item.hexdigest() for item in hashes]])
        rows += count
    return _Records(tuple(paths), rows, _digest(marks))


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _names(spec: MixtureSpec, held: tuple[str, ...], problems: Problems, notes: list[str]) -> tuple[str, ...]:
    """The domains in their order: ``set_names``, else the preset's, else as the data has them."""
    preset = PRESETS.get(spec.preset or "")
    names = spec.names or (preset.names if preset else held)
    twice = sorted({name for name in names if names.count(name) > 1})
    problems.add_names("domains", "are named twice", twice, "name each once")
    wrong = [name for name in held if not NAME.fullmatch(name)]
    problems.add_names("domains", "have names that cannot be used", wrong, NAMES)
    unknown = [name for name in names if name not in held]
    where = "set_names" if spec.names else f"the preset {spec.preset}"
    problems.add_names("domains", f"of {where} are not in the data", unknown, f"the data has {listed(held)}")
    left = [name for name in held if name not in names]
    if left:
        notes.append(f"the domains {listed(left)} are not used: {where} leaves them out")
    if preset and spec.names and set(names) - set(preset.names):
        other = [name for name in names if name not in preset.names]
        problems.add_names("domains", f"are none of the preset {spec.preset}", other, f"it has {listed(preset.names)}")
    return names


def _settings(spec: MixtureSpec, rule: str, count: int, problems: Problems, notes: list[str]) -> Settings:
    """The rule with its numbers; words that it does not obey become notes."""
    given = {
        "eta": spec.eta,
        "smoothing": spec.smoothing,
        "target_loss": spec.targets,
        "target_loss_from": spec.target_model,
        "proportion": spec.proportions,
        "temperature": spec.temperature,
    }
    for word, value in given.items():
        if value is not None and rule not in OBEYED[word]:
            notes.append(f"{word} has no effect with update_type {rule}")
    bounds = Bounds(spec.low or 0.0, 1.0 if spec.high is None else spec.high, spec.entropy or 0.0)
    if not bounds.allow(count):
        problems.add(
            f"min_weight={bounds.low:g}, max_weight={bounds.high:g}, min_entropy={bounds.entropy:g}: no proportions of "
            f"{count} domains fit",
            f"give min_weight of at most {1 / count:.6g}, max_weight of at least {1 / count:.6g} and min_entropy of at "
            f"most {np.log(count):.6g}",
        )
    return Settings(rule, 1.0 if spec.eta is None else spec.eta, spec.smoothing, spec.temperature or 1.0, bounds)


def _given(spec: MixtureSpec, names: tuple[str, ...], problems: Problems, notes: list[str]) -> Floats | None:
    """The user's proportions or the preset's, in the order of ``names``."""
    values = spec.proportions
    if values is None:
        values = _by_name(PRESETS.get(spec.preset or ""), "proportions")
    if values is None:
        problems.add("no proportion", "give one per domain, a preset, or update_type stratified or temperature")
        return None
    found = _ordered("proportion", values, names, problems, all_used=spec.proportions is not None)
    if found is None:
        return None
    low, total = float(found.min()), float(found.sum())
    if low < 0:
        problems.add(f"proportion has the negative number {low:g}", "give numbers of 0 or more")
    if spec.proportions is not None and abs(total - 1) > OFF:
        problems.add(f"proportion sums to {total:.6g}", "give numbers whose sum is 1")
    elif not total > 0:
        problems.add(f"the preset's proportions of {', '.join(names)} sum to {total:g}", "give proportion")
    elif abs(total - 1) > ROUNDED:
        notes.append(f"proportion sums to {total:.9g} and is divided by it")
    return found


def _targets(spec: MixtureSpec, names: tuple[str, ...], problems: Problems, notes: list[str]) -> Floats | None:
    """Target losses in the order of ``names``; None where a model is to be measured, or there are none."""
    preset = PRESETS.get(spec.preset or "")
    if spec.target_model is not None:
        return None
    values = spec.targets
    if isinstance(values, Path):
        values = _from_file(values)
        left = [name for name in values if name not in names] if isinstance(values, Mapping) else []
        if left:
            notes.append(f"target_loss {spec.targets} also has {listed(left)}, which are not drawn")
    if values is None:
        values = _by_name(preset, "targets")
    if values is None:
        problems.add(
            f"update_type {spec.rule} without target_loss",
            "give one per domain, a JSON file, target_loss_from: a model's folder, or a preset that has them",
        )
        return None
    found = _ordered(TARGETS, values, names, problems, all_used=isinstance(spec.targets, Mapping))
    if found is not None and found.min() < 0:
        problems.add(f"target_loss has the negative number {found.min():g}", "give losses in nats per token")
    return found


def _from_file(path: Path) -> Mapping[str, float] | tuple[float, ...]:
    """Losses of a JSON file: a list, or by name, alone or below the name target_loss."""
    found = read_json(path, "give a file with a list, or one number per domain")
    if isinstance(found, Mapping) and TARGETS in found:
        found = found[TARGETS]
    values = list(found.values()) if isinstance(found, Mapping) else found
    numbers = [as_number(item) for item in values] if isinstance(values, list) else []
    if not numbers or not all(number is not None and np.isfinite(number) for number in numbers):
        raise UserError(f"target_loss {path} holds no finite number per domain: give a list, or one number per name")
    return found if isinstance(found, Mapping) else tuple(map(float, values))


def _by_name(preset: Preset | None, field: str) -> Mapping[str, float] | None:
    values = getattr(preset, field) if preset else None
    return None if preset is None or values is None else dict(zip(preset.names, values, strict=True))


def _ordered(
    word: str,
    values: tuple[float, ...] | Mapping[str, float],
    names: tuple[str, ...],
    problems: Problems,
    all_used: bool = False,
) -> Floats | None:
    """One number per domain, in their order; ``all_used``: a mapping has no other names."""
    if isinstance(values, Mapping):
        other = [name for name in values if name not in names] if all_used else []
        problems.add_names("names", f"of {word} are no domains", other, f"the domains are {listed(names)}")
        missing = [name for name in names if name not in values]
        problems.add_names("domains", f"have no {word}", missing, "give one for each")
        return None if missing else np.array([values[name] for name in names], np.float64)
    if len(values) != len(names):
        problems.add(
            f"{word} has {len(values)} numbers for {len(names)} domains ({', '.join(names)})", "give one for each"
        )
        return None
    return np.array(values, np.float64)


def _check_measured(
    spec: MixtureSpec, settings: Settings, names: tuple[str, ...], measured: Mapping[str, _Records], problems: Problems
) -> None:
    """Where losses are measured, every domain has a row for it."""
    if settings.moves and not spec.interval:
        problems.add(f"update_type {settings.rule} without eval_interval", "give the steps of a window, for example 50")
    if not spec.interval:
        return
    missing = [name for name in names if name not in measured or not measured[name].rows]
    advice = "give eval_domains with a file for each" if spec.folder is None else "prepare eval rows of each"
    problems.add_names("domains", "have no row to measure losses on", missing, advice)


def _check_apart(
    names: tuple[str, ...],
    held: Mapping[str, _Records],
    measured: Mapping[str, _Records],
    problems: Problems,
    notes: list[str],
) -> None:
    """A file belongs to one domain; one that is also measured on is said."""
    owners: dict[Path, str] = {}
    for name in names:
        for path in held[name].paths:
            owner = owners.setdefault(path.resolve(), name)
            if owner != name:
                problems.add(f"{path} is given for {owner} and for {name}", "give each domain its own files")
    both = [str(path) for name in measured for path in measured[name].paths if path.resolve() in owners]
    if both:
        notes.append(f"losses are measured on rows that are trained on: {listed(both)}")


def _shown(names: tuple[str, ...], shares: Floats) -> str:
    return ", ".join(f"{name} {share:.4f}" for name, share in zip(names, shares, strict=True))
