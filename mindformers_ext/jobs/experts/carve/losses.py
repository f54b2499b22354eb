# SPDX-License-Identifier: Apache-2.0
"""What a carved mixture is worth: its loss beside the dense model's and that of simpler cuts of the same size.

Differences are paired: of two ways the same rows of text are compared, whose differences spread far less than the
losses themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindformers_ext.core.families import THRESHOLD
from mindformers_ext.surgery.experts.carve.recipes import (
    MEAN_GATE,
    ORACLE,
    REPRESENTATIVE,
    RIDGE,
    Recipe,
)
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES, NONE

DENSE, CARVED, STATIC = "dense", "carved", "static "
NO_LADDER = "none"
LADDERS = ("short", "full", NO_LADDER)


def ways(recipe: Recipe, ladder: str) -> dict[str, Recipe]:
    """What is compared, by name; CARVED first. ``ladder``: a word of LADDERS."""
    plain = replace(recipe, router=RIDGE, refit=NONE)
    fitted = replace(plain, refit=LEAST_SQUARES)
    short = {
        CARVED: recipe,
        f"{STATIC}wifv": replace(plain, method="wifv"),
        f"{STATIC}rel + {LEAST_SQUARES}": replace(fitted, method="rel"),
    }
    if ladder != "full":
        return short if ladder == "short" else {CARVED: recipe}
    routers = {
        f"router {name}": replace(recipe, router=name)
        for name in (RIDGE, MEAN_GATE, REPRESENTATIVE, THRESHOLD, ORACLE)
        if name != recipe.router
    }
    return {
        **short,
        f"{STATIC}activation": replace(plain, method="activation"),
        f"{STATIC}wifv + bias": replace(plain, method="wifv", bias=True),
        f"{STATIC}rel": replace(plain, method="rel"),
        "random split": replace(recipe, method="random", router=RIDGE),
        **routers,
    }


MEANING = {
    DENSE: "all neurons",
    CARVED: "this mixture",
    f"{STATIC}activation": "the neurons that add most on average, for every token",
    f"{STATIC}wifv": "the neurons whose answers vary most (FLAP), for every token",
    f"{STATIC}wifv + bias": "the same, what is cut added on average",
    f"{STATIC}rel": "the neurons that add most to the state's square, for every token",
    f"{STATIC}rel + {LEAST_SQUARES}": "the same, output matrices fitted anew",
    "random split": "this mixture with routed neurons grouped at random",
    f"router {RIDGE}": "this mixture, experts chosen by least squares",
    f"router {MEAN_GATE}": "this mixture, experts chosen by their mean gate row",
    f"router {REPRESENTATIVE}": "this mixture, experts chosen by one neuron each",
    f"router {THRESHOLD}": "this mixture, experts above a threshold: as many on average, no stock file has it",
    f"router {ORACLE}": "this mixture, the experts that add most, which nobody knows before",
}


@dataclass(frozen=True, eq=False)
class Judged:
    """Sums of the loss over each row that judges (R), by way, and each row's predicted tokens (R). ``is_mixture``:
    whether CARVED is one."""

    losses: Mapping[str, np.ndarray]
    tokens: np.ndarray
    is_mixture: bool = True

    def mean(self, name: str) -> float:
        """Nats per token."""
        return float(self.losses[name].sum() / self.tokens.sum())

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """Nats per token that ``name`` loses more than ``other``, and the standard error over the rows (of a ratio of
        sums); it is no number with a single row."""
        apart = self.losses[name] - self.losses[other]
        mean = float(apart.sum() / self.tokens.sum())
        rows = len(apart)
        if rows < 2:
            return mean, float("nan")
        spread = np.square(apart - mean * self.tokens).sum() * rows / (rows - 1)
        return mean, float(np.sqrt(spread) / self.tokens.sum())

    def rival(self) -> str | None:
        """The static cut of lowest loss."""
        static = [name for name in self.losses if name.startswith(STATIC)]
        return min(static, key=self.mean) if static else None

    def verdict(self) -> str:
        """Whether routing pays, in a sentence."""
        if CARVED in self.losses and not self.is_mixture:
            return "a static cut was measured, no mixture"
        name = self.rival()
        if name is None or CARVED not in self.losses:
            return "the mixture was not compared with static cuts"
        apart, error = self.difference(CARVED, name)
        found = f"{abs(apart):.4f} +- {error:.4f} nats per token"
        if apart >= 0:
            return f"A STATIC CUT OF THE SAME SIZE IS BETTER: '{name}' loses {found} less than this mixture"
        return f"this mixture loses {found} less than the best static cut of the same size, '{name}'"

    def lines(self) -> list[str]:
        """The verdict, and one line a way, the best first."""
        width, rows = max(map(len, self.losses)), []
        for name in sorted(self.losses, key=self.mean):
            apart, error = self.difference(name, DENSE)
            more = "" if name == DENSE else f"  {apart:+.4f} +- {error:.4f}"
            rows.append(f"{name:{width}}  {self.mean(name):.4f}{more:20}  {MEANING[name]}".rstrip())
        return [self.verdict(), *rows]

    def json(self) -> dict[str, Any]:
        """All of it for a file."""
        found = {}
        for name in self.losses:
            figures: dict[str, Any] = {"loss": self.mean(name), "rows": self.losses[name].tolist()}
            for other in (DENSE, CARVED):
                if other in self.losses and other != name:
                    apart, error = self.difference(name, other)
                    figures[f"to_{other}"] = {"difference": apart, "standard_error": None if error != error else error}
            found[name] = figures
        return {
            "verdict": self.verdict(),
            "judged_tokens": int(self.tokens.sum()),
            "row_tokens": self.tokens.tolist(),
            "ways": found,
        }
