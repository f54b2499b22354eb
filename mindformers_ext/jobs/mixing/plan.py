# SPDX-License-Identifier: Apache-2.0
"""What a data mixture means before training: which rows of each domain a run takes, and how often they come again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.mixture_words import MIXTURE, PLACE, mixture_from_yaml, with_mixture_words
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.mindrecord_file import MindRecordFile
from mindformers_ext.jobs.run.mixture import Mixture, open_mixture

Floats = npt.NDArray[np.float64]
WIDTH = "input_ids"


@dataclass(frozen=True)
class DomainPlan:
    """One domain of a run. rows: that it has; ``proportion`` at the start; ``passes`` over its rows by that proportion,
    and ``most`` if its proportion were as large as the rule can make it (the same where nothing moves)."""

    name: str
    rows: int
    proportion: float
    passes: float
    most: float


@dataclass(frozen=True)
class Plan:
    """A run of ``rows`` rows of ``width`` tokens; ``rule`` moves the proportions, or keeps them."""

    rule: str
    rows: int
    width: int
    domains: tuple[DomainPlan, ...]
    notes: tuple[str, ...]


def plan(config: Path | None, words: Mapping[str, Any], tokens: float | None, repeat: float) -> Plan:
    """The plan of a run.

    Args:
        config: a run's YAML, or None.
        words: of ``train_dataset.data_loader``; they count before the YAML's.
        tokens: of the run; None: the YAML's epochs.
        repeat: passes beyond which a note is given.

    Raises:
        UserError: the YAML has no data mixture, neither tokens nor a YAML say how long the run is, ...
    """
    read = with_mixture_words(load_yaml(config)) if config else {}
    found = section_at(read, PLACE)
    if config and found.get("type") != MIXTURE:
        raise UserError(f"{config}: {PLACE}.type is {found.get('type')!r}: a plan is of a {MIXTURE}")
    if config is None and tokens is None:
        raise UserError("how long is the run? give --tokens, or --config with a run's YAML")
    problems = Problems(f"{config or 'mix plan'}")
    spec = mixture_from_yaml({**found, **words, "type": MIXTURE}, PLACE, problems)
    problems.raise_if_any()
    assert spec is not None
    mixture = open_mixture(spec)
    width = _width(mixture)
    epochs = section_at(read, "runner_config").get("epochs") or 1
    if tokens is None and not (type(epochs) is int and 0 < epochs < 2**31):
        raise UserError(f"{config}: runner_config.epochs={epochs!r} is not a number of passes")
    rows = mixture.samples * epochs if tokens is None else max(1, round(tokens / width))
    domains = tuple(_domains(mixture, rows))
    return Plan(mixture.settings.rule, rows, width, domains, (*mixture.notes, *_notes(domains, repeat)))


def _width(mixture: Mixture) -> int:
    """Tokens of a row."""
    path = next(paths[0] for paths in mixture.files if paths)
    with closing(MindRecordFile(path)) as file:
        if WIDTH not in file.fields or not len(file):
            raise UserError(f"{path} has no column {WIDTH}, or no row: prepare it with llama_preprocess.py")
        (ids,) = file.read(0, (WIDTH,))
    return len(ids)


def _domains(mixture: Mixture, rows: int) -> list[DomainPlan]:
    highest = mixture.settings.bounds.high if mixture.settings.moves else None
    return [
        DomainPlan(
            domain.name,
            domain.rows,
            float(share),
            float(share * rows / domain.rows),
            float((share if highest is None else highest) * rows / domain.rows),
        )
        for domain, share in zip(mixture.domains, mixture.proportions, strict=True)
    ]


def _notes(domains: tuple[DomainPlan, ...], repeat: float) -> list[str]:
    notes = [
        f"{one.name} comes {one.passes:.1f} times, more than {repeat:g}: a proportion of "
        f"{one.proportion * repeat / one.passes:.4f} would not, or {one.passes / repeat:.1f} times its rows"
        for one in domains
        if one.passes > repeat
    ]
    moving = [one.name for one in domains if one.passes <= repeat < one.most]
    if moving:
        notes.append(
            f"moving proportions could repeat {', '.join(moving)} more than {repeat:g} times: max_weight sets a limit"
        )
    return notes
