# SPDX-License-Identifier: Apache-2.0
"""Which experts of a mixture stay: scores by what tokens sent to them, and the gate that is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.surgery.prune.hard_concrete import Floats

REAP, FREQUENCY, RANDOM = "reap", "frequency", "random"
MEANING = {
    REAP: "mean over an expert's tokens of gate weight times norm of its output",
    FREQUENCY: "how many tokens chose it",
    RANDOM: "drawn by the seed",
}


@dataclass
class ExpertSums:
    """What the tokens of a layer did: per expert (E) how many ``chosen`` it and the sum of gate weight times norm of
    output. ``gram`` (E, E): products of the hidden values of a gate of two layers; None of other gates."""

    chosen: Any = 0.0
    weighed: Any = 0.0
    gram: Floats | None = field(default=None)

    def add(self, chosen: np.ndarray, weights: np.ndarray, norms: np.ndarray, hidden: np.ndarray | None = None) -> None:
        """Tokens (T, E): 1 where a token chose the expert, its gate weight, the norm of the expert's output.

        A token's weights count relative to their sum, as in REAP's code since March 2026: of a model that does not
        normalise them, tokens would otherwise count by how sure the gate was of all chosen together.
        """
        sizes = np.abs(weights.astype(np.float64)) * chosen
        share = sizes / np.maximum(sizes.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        self.chosen = self.chosen + chosen.sum(0, dtype=np.float64)
        self.weighed = self.weighed + (share * norms).sum(0)
        if hidden is not None:
            wide = hidden.astype(np.float64)
            self.gram = wide.T @ wide + (0.0 if self.gram is None else self.gram)


def reap(sums: ExpertSums) -> Floats:
    """Router-weighted expert activation (Lasby et al. 2025, REAP): (E); 0 of an expert that nobody chose."""
    return np.asarray(sums.weighed / np.maximum(sums.chosen, 1.0))


def frequency(sums: ExpertSums) -> Floats:
    """Tokens of each expert (E)."""
    return np.asarray(sums.chosen)


SCORES: Mapping[str, Callable[[ExpertSums], Floats]] = {REAP: reap, FREQUENCY: frequency}


def highest(scores: npt.ArrayLike, keep: int) -> tuple[int, ...]:
    """Numbers of the ``keep`` experts of the highest scores, rising; of equal ones the lower number stays."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return tuple(sorted(order[:keep].tolist()))


def drawn(layers: int, experts: int, keep: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Experts that stay in each of ``layers`` layers, drawn without replacement."""
    generator = np.random.default_rng(seed)
    return tuple(tuple(sorted(generator.choice(experts, keep, replace=False).tolist())) for _ in range(layers))


@dataclass(frozen=True, eq=False)
class HiddenGate:
    """What is left of a gate of two layers, E' wide inside: ``units`` that stay, ``out`` (E', E'), and the share of the
    logits' squares that they cannot say."""

    units: tuple[int, ...]
    out: npt.NDArray[np.float32]
    lost: float


def narrower_gate(out: np.ndarray, gram: Floats, kept: tuple[int, ...]) -> HiddenGate:
    """LLaMA-MoE's gate of two layers is as wide inside as there are experts, so cut rows are not enough.

    Hidden units are taken out one by one, each time the one without which least squares says the kept experts' logits
    best on the calibration tokens; ``out`` is that fit. Inner units belong to no expert.

    Args:
        out: the second layer (E, E).
        gram: products of hidden values, summed over tokens (E, E).
        kept: the experts that stay.
    """
    wanted = out[list(kept)].astype(np.float64)
    units = list(range(out.shape[1]))
    while len(units) > len(kept):
        units.remove(min(units, key=lambda unit: _fit(wanted, gram, [one for one in units if one != unit])[1]))
    fitted, left = _fit(wanted, gram, units)
    whole = float(np.einsum("ed,df,ef->", wanted, gram, wanted))
    return HiddenGate(tuple(units), fitted.astype(np.float32), left / whole if whole > 0 else 0.0)


def _fit(wanted: Floats, gram: Floats, units: list[int]) -> tuple[Floats, float]:
    """Weights (E', units) that say ``wanted`` best, and the sum of squares that is left."""
    across = wanted @ gram[:, units]
    fitted = np.linalg.lstsq(gram[np.ix_(units, units)], across.T, rcond=None)[0].T
    left = np.einsum("ed,df,ef->", wanted, gram, wanted) - np.einsum("ed,ed->", fitted, across)
    return fitted, max(float(left), 0.0)
