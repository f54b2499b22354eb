# SPDX-License-Identifier: Apache-2.0
"""User errors: what was found, what is allowed, what to do. Every broken rule in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST_LINES = 200  # problems in one message; finding the word nearest to an unknown one takes milliseconds
LISTED = 20  # names, numbers or known words that a message lists in full


class UserError(ValueError):
    """A mistake the user can mend. Commands print its text without a traceback and exit with code 2."""


class Problems:
    """Collects broken rules and raises them together, so that a user mends a file once."""

    def __init__(self, subject: str) -> None:
        """``subject``: what is being checked, for example the YAML's path."""
        self.subject = subject
        self.lines: list[str] = []

    def add(self, found: str, advice: str) -> None:
        """Record one broken rule: what was found and what to do. So many that nobody reads them are raised at once."""
        self.lines.append(f"{found}: {advice}")
        if len(self.lines) >= MOST_LINES:
            self.lines.append(f"and perhaps more: reading stopped after {MOST_LINES} problems")
            self.raise_if_any()

    def positive(self, name: str, value: object, most: int | None = None) -> None:
        """``value`` must be an int above 0, up to ``most``."""
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.add(f"{name}={value!r}", "give a whole number above 0")
        elif most is not None and value > most:
            self.add(f"{name}={value} is out of range", f"give at most {most}")

    def one_of(self, name: str, value: object, allowed: Sequence[object]) -> None:
        """``value`` must be in ``allowed``."""
        if value not in allowed:
            self.add(f"{name}={value!r} is unknown", "choose one of " + ", ".join(map(str, allowed)))

    def divides(self, whole_name: str, whole: int, part_name: str, part: int) -> None:
        """``part`` must divide ``whole`` without rest."""
        if part > 0 and whole % part:
            lower, upper = whole // part * part, (whole // part + 1) * part
            near = f"{upper}" if lower == 0 else f"{lower} or {upper}"
            self.add(
                f"{whole_name}={whole} is not a multiple of {part_name}={part}", f"use {near}, or change {part_name}"
            )

    def add_names(self, noun: str, what: str, names: Sequence[object], advice: str) -> None:
        """One broken rule of all ``names`` together, if there are any: "3 tensors are missing: a, b, c"."""
        if names:
            self.add(f"{len(names)} {noun} {what}: {listed(names)}", advice)

    def unknown_keys(self, where: str, given: Iterable[str], known: Iterable[str]) -> None:
        """Every given key must be known; the nearest known key is named."""
        names = sorted(known)
        for key in given:
            if key not in names:
                self.add(f"unknown key '{key}' in {where}", nearest(key, names))

    def raise_if_any(self) -> None:
        """Raise one ``UserError`` that lists everything, or return."""
        if self.lines:
            listed = "\n".join(f"  - {line}" for line in self.lines)
            count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
            raise UserError(f"{self.subject}: {count}\n{listed}")


def listed(items: Sequence[object]) -> str:
    """The first of ``items``, and how many more there are."""
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(map(str, items[:LISTED])) + more


def nearest(name: str, known: Sequence[str]) -> str:
    """Advice that names the known word nearest to ``name``."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    if len(known) <= LISTED:
        return "known: " + listed(known)
    return "the nearest known are " + ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
