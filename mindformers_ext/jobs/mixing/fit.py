# SPDX-License-Identifier: Apache-2.0
"""The proportions that several runs speak for, with a limit on how often a domain may be repeated, and error bars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.mixture.law import Best, best_with_spread, fitted, runs_needed
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.mixing.runs import Outcome, outcomes

Floats = npt.NDArray[np.float64]
FORMAT = "mindformers_ext mixture fit 1"
ENOUGH = 3  # runs a domain: what public sweeps take (Olmix: linear in the number of domains)


@dataclass(frozen=True)
class FitRequest:
    """runs: folders of runs, or files of JSON lines (``jobs.mixing.runs``).

    weights: of the domains' losses in what is made least; those not named have 1, and all are divided by their sum.
    tokens: of the run to come, and ``available`` of each domain; with both, none is repeated over ``repeat`` times.
    drawings: fits for the error bars, with ``seed``. output: where the figures go as JSON, None for nowhere.
    """

    runs: Sequence[Path]
    weights: Mapping[str, float] = field(default_factory=dict)
    tokens: float | None = None
    available: Mapping[str, float] = field(default_factory=dict)
    repeat: float = 4.0
    drawings: int = 100
    seed: int = 0
    output: Path | None = None


@dataclass(frozen=True)
class Fit:
    """What was found. weights, caps: of the domains (n). ``missed``: root mean square of loss minus law over all.

    ``uniform``: losses (n) by the law at 1/n each. ``seen``: the run whose weighted loss, as measured, is the least.
    """

    names: tuple[str, ...]
    runs: int
    weights: Floats
    caps: Floats
    best: Best
    missed: float
    uniform: Floats
    seen: str
    seen_loss: float
    notes: tuple[str, ...]

    @property
    def objective(self) -> tuple[float, float]:
        """Weighted loss by the law at the best proportions, and at 1/n each."""
        return float(self.weights @ self.best.losses), float(self.weights @ self.uniform)


def fit(request: FitRequest) -> Fit:
    """Fit the law to the runs, and find the proportions with the least weighted loss.

    Raises:
        UserError: too few runs, runs on different domains, limits that leave no room, ...
    """
    runs = outcomes(request.runs)
    names = tuple(runs[0].losses)
    weights, caps = _checked(request, names, len(runs))
    shares = np.array([[run.proportions[name] for name in names] for run in runs])
    losses = np.array([[run.losses[name] for name in names] for run in runs])
    if np.linalg.matrix_rank(shares) < len(names):
        raise UserError(
            f"the {len(runs)} runs do not tell the {len(names)} domains apart (their proportions lie in a plane): add "
            "runs with other proportions"
        )
    law = fitted(shares, losses)
    best = best_with_spread(shares, losses, weights, caps, request.drawings, request.seed)
    values = losses @ weights
    found = Fit(
        names,
        len(runs),
        weights,
        caps,
        best,
        float(np.sqrt(np.mean((law.losses(shares) - losses) ** 2))),
        law.losses(np.full(len(names), 1 / len(names))),
        runs[int(values.argmin())].name,
        float(values.min()),
        _notes(names, shares, best),
    )
    if request.output is not None:
        write_text(request.output, json.dumps(_content(found, runs, law.constants, law.slopes), indent=1) + "\n")
    return found


def _checked(request: FitRequest, names: tuple[str, ...], runs: int) -> tuple[Floats, Floats]:
    """Weights and caps (n)."""
    problems = Problems("mix fit")
    for word, given in (("--weight", request.weights), ("--available", request.available)):
        problems.add_names(
            word, "name no domain of the runs", sorted(set(given) - set(names)), f"known: {', '.join(names)}"
        )
    weights = np.array([request.weights.get(name, 1.0) for name in names], np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        problems.add("--weight: weights are numbers from 0, one above 0", "correct them")
    if bool(request.available) != (request.tokens is not None):
        problems.add("--tokens and --available belong together", "give both, or neither for no limit of repeats")
    needed = runs_needed(len(names))
    if runs < needed:
        problems.add(
            f"{runs} runs, and the law of {len(names)} domains has {needed} numbers a domain",
            f"give {needed} runs at least; {ENOUGH * len(names)} are usual",
        )
    problems.raise_if_any()
    caps = np.ones(len(names))
    if request.tokens is not None:
        held = np.array([request.available.get(name, np.inf) for name in names])
        caps = np.minimum(request.repeat * held / request.tokens, 1.0)
        if not caps.sum() >= 1.0:
            raise UserError(
                f"{request.tokens:.3g} tokens with at most {request.repeat:g} passes over each domain need "
                f"{request.tokens / request.repeat:.3g} tokens of data, there are {held.sum():.3g}: train on fewer "
                "(--tokens), allow more passes (--repeat), or add data"
            )
    return weights / weights.sum(), caps


def _notes(names: tuple[str, ...], shares: Floats, best: Best) -> tuple[str, ...]:
    notes, (runs, count) = [], shares.shape
    if runs < ENOUGH * count:
        notes.append(f"{runs} runs for {count} domains are few: {ENOUGH * count} are usual, and error bars are rough")
    outside = [
        f"{name} {share:.3f} ({low:.3f} to {high:.3f})"
        for name, share, low, high in zip(names, best.proportions, shares.min(0), shares.max(0), strict=True)
        if not low - 1e-3 <= share <= high + 1e-3
    ]
    if outside:
        notes.append(f"beyond what any run has tried, so the law is a guess there: {', '.join(outside)}")
    if best.fits < 2:
        notes.append("too few runs for error bars")
    return tuple(notes)


def _content(found: Fit, runs: Sequence[Outcome], constants: Floats, slopes: Floats) -> dict[str, Any]:
    """The figures as JSON; "proportion" is what a YAML's data_loader takes."""

    def named(values: Floats) -> dict[str, float | None]:
        return {n: float(v) if np.isfinite(v) else None for n, v in zip(found.names, values, strict=True)}

    return {
        "format": FORMAT,
        "proportion": named(found.best.proportions),
        "proportion_spread": named(found.best.spread),
        "loss": named(found.best.losses),
        "loss_spread": named(found.best.loss_spread),
        "uniform_loss": named(found.uniform),
        "weights": named(found.weights),
        "caps": named(found.caps),
        "law": {
            "constants": named(constants),
            "slopes": {name: named(row) for name, row in zip(found.names, slopes, strict=True)},
        },
        "missed": found.missed,
        "fits": found.best.fits,
        "runs": [{"name": run.name, "proportions": run.proportions, "losses": run.losses} for run in runs],
        "notes": found.notes,
    }
