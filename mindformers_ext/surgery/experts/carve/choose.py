# SPDX-License-Identifier: Apache-2.0
"""Ways to choose a layer's routed experts for a token. Each gives bool (T, E), as many True, a token or on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mindformers_ext.surgery.experts.scores import best


class Chooser(Protocol):
    """Chooses from what enters the part, x (T, D), and its neurons' answers (T, F), which only an oracle looks at."""

    def choose(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """bool (T, E)."""


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """bool: the ``count`` highest of each row; of equal ones the lower number."""
    return best(torch.from_numpy(np.ascontiguousarray(scores)), count).numpy()


def linear_choice(x: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """bool (T, E): the experts of the highest x . row; float32, as a router of a file computes."""
    return highest(x @ rows.astype(np.float32).T, count)


@dataclass(frozen=True, eq=False)
class Linear:
    """A router of one matrix ``rows`` (E, D), which any file of a mixture can hold."""

    rows: np.ndarray
    count: int

    def choose(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """By x . row."""
        return linear_choice(x, self.rows, self.count)


@dataclass(frozen=True, eq=False)
class Threshold:
    """The experts whose x . row is ``least`` or more: of some tokens none, of others all, on average as many."""

    rows: np.ndarray
    least: float

    @classmethod
    def fitted(cls, x: np.ndarray, rows: np.ndarray, count: int) -> Threshold:
        """That which chooses ``count`` experts a token on the tokens x (T, D); rows (E, D) as they are, since a
        router less its mean knows which experts add more, and not how much. It lies between two scores, so that
        whoever sums in another order chooses alike."""
        scores = (x @ rows.astype(np.float32).T).ravel()
        place = len(scores) - len(x) * count
        below, least = np.partition(scores, (max(place - 1, 0), place))[[max(place - 1, 0), place]]
        between = np.float32((below + least) / 2)
        return cls(rows.astype(np.float32), float(between if below < between else least))

    @property
    def bias(self) -> np.ndarray:
        """float32 (E): added to the scores, those of 0 or more are of the chosen."""
        return np.full(len(self.rows), -self.least, np.float32)

    def choose(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """By x . row."""
        return np.asarray(x @ self.rows.T >= np.float32(self.least))


@dataclass(frozen=True, eq=False)
class Representative:
    """CMoE's router: one neuron speaks for each expert, |u x silu(g x)| with rows of length 1 (E, D)."""

    gate: np.ndarray
    up: np.ndarray
    count: int

    @classmethod
    def of(cls, gate: np.ndarray, up: np.ndarray, neurons: np.ndarray, count: int) -> Representative:
        """The rows of ``neurons`` (E) of gate and up (F, D)."""
        return cls(_unit(gate[neurons]), _unit(up[neurons]), count)

    def choose(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """By the neurons' answers."""
        linear = torch.from_numpy(x @ self.gate.T)
        return highest(np.abs(torch.nn.functional.silu(linear).numpy() * (x @ self.up.T)), self.count)


@dataclass(frozen=True, eq=False)
class Oracle:
    """The experts whose outputs |D_j h_j| are largest, which nobody knows before computing them all."""

    experts: Sequence[np.ndarray]
    down: np.ndarray
    count: int

    def choose(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """By the outputs."""
        return highest(output_lengths(hidden, self.down, self.experts), self.count)


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def output_lengths(hidden: np.ndarray, down: np.ndarray, experts: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (T, E): |D_j h_j|, as ``scores.output_norms``; through D_j'D_j where an expert is narrower than D."""
    found = np.empty((len(hidden), len(experts)), np.float32)
    for place, ids in enumerate(experts):
        own = down[:, ids]
        narrow = own.T @ own if len(ids) < len(down) else None
        for start in range(0, len(hidden), 2048):
            part = hidden[start : start + 2048, ids]
            if narrow is None:
                found[start : start + 2048, place] = np.linalg.norm(part @ own.T, axis=1)
            else:
                squares = np.einsum("ti,ti->t", part @ narrow, part, dtype=np.float64)
                found[start : start + 2048, place] = np.sqrt(np.maximum(squares, 0.0))
    return found
