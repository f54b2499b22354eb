# SPDX-License-Identifier: Apache-2.0
"""What runs on a data mixture have measured of each domain, from their metrics or from lines of JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.core.json_text import JsonError, parse_json
from mindformers_ext.jobs.run.metrics import read_records

Floats = npt.NDArray[np.float64]
PROPORTION, ROWS, LOSS = "proportion.", "rows.", "domain_loss."  # and a domain's name: keys of a record
LONGEST = 1 << 20  # characters of a line that describes a run


@dataclass(frozen=True)
class DomainCurves:
    """A run's N recorded steps and M evaluations, of n domains. Losses in nats per token, NaN where one was no number.

    ``rows``: drawn of each domain up to its step, all passes counted.
    """

    names: tuple[str, ...]
    step: Floats  # (N,)
    proportions: Floats  # (N, n)
    rows: Floats  # (N, n)
    evaluated: Floats  # (M,) steps
    losses: Floats  # (M, n)


@dataclass(frozen=True)
class Outcome:
    """One run in two lines of numbers by domain: the shares of the rows that it was trained on, and its last losses."""

    name: str
    proportions: Mapping[str, float]
    losses: Mapping[str, float]


def read_curves(run_folder: Path) -> DomainCurves:
    """The figures by domain that a training run has recorded.

    Raises:
        UserError: no metrics there, or a run that was on no data mixture.
    """
    records = [record for _, record in sorted(read_records(run_folder)[0].items())]  # every rank records the same
    names = tuple(key.removeprefix(ROWS) for key in records[-1] if key.startswith(ROWS)) if records else ()
    if not names:
        raise UserError(
            f"{run_folder}: its steps tell of no domains: give the output_dir of a run whose train_dataset.data_loader "
            "is a MixtureDataset"
        )
    measured = [record for record in records if any(record.get(LOSS + name) is not None for name in names)]

    def table(chosen: Sequence[Mapping[str, Any]], word: str) -> Floats:
        cells = [[_number(record.get(word + name)) for name in names] for record in chosen]
        return np.array(cells, np.float64).reshape(-1, len(names))

    return DomainCurves(
        names,
        np.array([record["step"] for record in records], np.float64),
        table(records, PROPORTION),
        table(records, ROWS),
        np.array([record["step"] for record in measured], np.float64),
        table(measured, LOSS),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """The runs of each path: a run's folder is one, a file of JSON lines has one a line (``EXAMPLE``).

    Raises:
        UserError: a path is neither, a number is none, or two runs have different domains.
    """
    found = [outcome for path in paths for outcome in (_of_lines(path) if path.is_file() else [_of_folder(path)])]
    for one in found:
        if list(one.losses) != list(found[0].losses):
            raise UserError(
                f"{one.name} has the domains {listed(list(one.losses))}, {found[0].name} has "
                f"{listed(list(found[0].losses))}: give runs on the same domains"
            )
    return found


def _of_folder(folder: Path) -> Outcome:
    curves = read_curves(folder)
    if not len(curves.losses):
        raise UserError(f"{folder}: no losses by domain were measured: set eval_interval in train_dataset.data_loader")
    shares = curves.rows[-1] / curves.rows[-1].sum()
    return _checked(
        str(folder),
        dict(zip(curves.names, shares.tolist(), strict=True)),
        dict(zip(curves.names, curves.losses[-1].tolist(), strict=True)),
    )


def _of_lines(path: Path) -> list[Outcome]:
    result = []
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST), ""), start=1):
                if line.strip():
                    result.append(_parsed(line, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: give a file of JSON lines or a run's folder") from error
    if not result:
        raise UserError(f"{path} holds no run: give lines like {EXAMPLE}")
    return result


EXAMPLE = '{"proportions": {"code": 0.4, "wiki": 0.6}, "losses": {"code": 1.9, "wiki": 2.8}}'


def _parsed(line: str, where: str) -> Outcome:
    try:
        found = parse_json(line)
        proportions, losses = found["proportions"], found["losses"]
        if not (isinstance(proportions, dict) and isinstance(losses, dict)):
            raise KeyError
    except (JsonError, KeyError, TypeError) as error:
        raise UserError(f"{where} does not describe a run: give lines like {EXAMPLE}") from error
    return _checked(where, proportions, losses)


def _checked(where: str, proportions: Mapping[str, Any], losses: Mapping[str, Any]) -> Outcome:
    """The run with its domains in the order of their names."""
    if set(proportions) != set(losses):
        odd = sorted(set(proportions) ^ set(losses))
        raise UserError(f"{where}: {listed(odd)} in one of proportions and losses alone: give both for every domain")
    names = sorted(losses)
    shares = {name: _number(proportions[name]) for name in names}
    found = {name: _number(losses[name]) for name in names}
    wrong = [name for name in names if not (0 <= shares[name] <= 1) or not (0 < found[name] < math.inf)]
    if wrong:
        raise UserError(
            f"{where}: {listed(wrong)}: a proportion is a number from 0 to 1, a loss one above 0 (nats per token)"
        )
    total = sum(shares.values())
    if abs(total - 1) > 1e-3:
        raise UserError(f"{where}: the proportions sum to {total:.6g}, not to 1: correct them")
    return Outcome(where, {name: share / total for name, share in shares.items()}, found)
