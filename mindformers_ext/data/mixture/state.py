# SPDX-License-Identifier: Apache-2.0
"""Where a data mixture stands, as a checkpoint holds it: a JSON text of less than 10 KB."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import JsonError, parse_json

FORMAT = "mindformers_ext data mixture 1"
LARGEST = 10_000  # bytes
DIGITS = 6  # of proportions in the history, which is for people


@dataclass(frozen=True)
class Domain:
    """Rows of one origin. ``fingerprint``: short name of its files and of what some of their rows hold."""

    name: str
    rows: int
    fingerprint: str


@dataclass(frozen=True)
class MixtureState:
    """A mixture before its step ``step`` (from 0).

    seed, batch: of the draws, and rows of one step of all processes. ``interval``: steps of a window, 0 for none.
    proportions: of the present window, in the order of ``domains``. ``used``: rows drawn of each so far, in all passes.
    history: (window, proportions) of the last windows, oldest first.
    """

    seed: int
    batch: int
    interval: int
    domains: tuple[Domain, ...]
    proportions: tuple[float, ...]
    used: tuple[int, ...]
    step: int = 0
    history: tuple[tuple[int, tuple[float, ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(domain.name for domain in self.domains)

    def to_json(self) -> str:
        """The state as text; of the history as many of the last windows as fit into 10 KB."""
        passes, cursors = zip(*(divmod(n, d.rows) for n, d in zip(self.used, self.domains, strict=True)), strict=True)
        text = {
            "format": FORMAT,
            "seed": self.seed,
            "batch": self.batch,
            "eval_interval": self.interval,
            "global_step": self.step,
            "domains": self.names,
            "rows": [domain.rows for domain in self.domains],
            "fingerprints": [domain.fingerprint for domain in self.domains],
            "proportions": list(self.proportions),
            "cursors": cursors,
            "passes": passes,
            "history": [],
        }
        left = LARGEST - len(_dumped(text)) - 1
        kept: list[Any] = []
        for window, proportions in reversed(self.history):
            entry = [window, [float(f"{p:.{DIGITS}g}") for p in proportions]]
            left -= len(_dumped(entry)) + 1
            if left < 0:
                break
            kept.insert(0, entry)
        return _dumped({**text, "history": kept})


def _dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def state_from_json(text: str, where: str) -> MixtureState:
    """The state that ``to_json`` has written; ``where`` names its file.

    Raises:
        UserError: not such a text.
    """
    try:
        if len(text) > LARGEST:
            raise ValueError(f"{len(text)} bytes")
        found = parse_json(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format {str(found['format'])[:80]!r}")
        return _read(found)
    except (JsonError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: the state of the data mixture cannot be read ({error}): resume from another checkpoint, or "
            "start from its weights without --resume_training"
        ) from error


def _read(found: Mapping[str, Any]) -> MixtureState:
    columns = [found[name] for name in ("domains", "rows", "fingerprints", "cursors", "passes")]
    if not columns[0] or len({len(column) for column in columns if isinstance(column, list)}) != 1:
        raise ValueError("lists of different lengths")
    names, rows, prints, cursors, passes = columns
    domains = tuple(
        Domain(_text(name), _count(count, 1), _text(mark))
        for name, count, mark in zip(names, rows, prints, strict=True)
    )
    proportions = _shares(found["proportions"], len(domains))
    used = tuple(_count(_count(p) * d.rows + _count(c)) for c, p, d in zip(cursors, passes, domains, strict=True))
    history = tuple((_count(window), _shares(shares, len(domains))) for window, shares in found["history"])
    seed, batch, interval, step = (_count(found[name]) for name in ("seed", "batch", "eval_interval", "global_step"))
    return MixtureState(seed, batch, interval, domains, proportions, used, step, history)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is no text")
    return value


def _count(value: Any, low: int = 0) -> int:
    if type(value) is not int or not low <= value < 1 << 62:
        raise ValueError("a number is out of range")
    return value


def _shares(values: Any, count: int) -> tuple[float, ...]:
    shares = tuple(float(value) for value in values if isinstance(value, (int, float)))
    if len(shares) != count or len(values) != count or not all(0 <= p <= 1 for p in shares):
        raise ValueError("proportions are out of range")
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-3):
        raise ValueError("proportions do not sum to 1")
    return shares


def check_continues(saved: MixtureState, own: MixtureState, where: str) -> None:
    """Whether a run that begins as ``own`` can go on from ``saved``, which stands in ``where``.

    Raises:
        UserError: lists what differs: seed, rows of a step, windows, domains, their order, or their data.
    """
    problems = Problems(f"cannot resume from {where}: its data mixture was another one")
    if saved.seed != own.seed:
        problems.add(f"its seed was {saved.seed}, now it is {own.seed}", f"set seed to {saved.seed}")
    if saved.batch != own.batch:
        problems.add(
            f"a step took {saved.batch} rows, now it takes {own.batch}",
            "choose batch_size, gradient_accumulation_steps and the number of processes so that their product is "
            f"{saved.batch}",
        )
    if saved.interval != own.interval:
        problems.add(
            f"eval_interval was {saved.interval or 'not set'}, now it is {own.interval or 'not set'}",
            f"set it to {saved.interval} again" if saved.interval else "leave it out again",
        )
    before, now = saved.names, own.names
    if set(before) != set(now):
        what = [f"without {name}" for name in before if name not in now]
        what += [f"with {name}" for name in now if name not in before]
        problems.add(f"it had the domains {', '.join(before)}; now it is {', '.join(what)}", "give the same domains")
    elif before != now:
        problems.add(f"the order of its domains was {', '.join(before)}, now it is {', '.join(now)}", "keep the order")
    else:
        for old, new in zip(saved.domains, own.domains, strict=True):
            if old != new:
                problems.add(
                    f"domain {old.name} had {old.rows} rows (fingerprint {old.fingerprint}), now it has {new.rows} "
                    f"({new.fingerprint})",
                    "give the same files, or start from the weights without --resume_training",
                )
    problems.raise_if_any()
