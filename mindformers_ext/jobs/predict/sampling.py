# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token, in numpy, as a ``SamplingSpec`` says.

The order is transformers': repetition penalty, minimum length, then temperature, top-k and top-p where sampling is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.config.sampling import SamplingSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]
LOWEST = np.float32(-np.inf)


def adjusted(logits: Floats, text: Sequence[int] | Ints, prompt: int, spec: SamplingSpec) -> Floats:
    """Logits (V) after the repetition penalty (Keskar et al. 2019, section 4.1, prompt included) and without the end
    tokens as long as ``text`` (prompt of ``prompt`` tokens, and answer) is too short."""
    banned = list(spec.eos_token_ids) if len(text) < spec.shortest(prompt) else []
    if spec.repetition_penalty == 1.0 and not banned:
        return logits
    result = logits.copy()
    if spec.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(text))
        score, penalty = result[seen], np.float32(spec.repetition_penalty)
        result[seen] = np.where(score < 0, score * penalty, score / penalty)
    result[banned] = LOWEST
    return result


def probabilities(logits: Floats, spec: SamplingSpec) -> npt.NDArray[np.float64]:
    """Probabilities (V) to draw from: temperature, then top-k, then top-p (Holtzman et al. 2020).

    Ties with the k-th best token stay; top-p keeps the smallest set of best tokens whose mass reaches it.
    """
    scaled = logits.astype(np.float64) / spec.temperature
    if 0 < spec.top_k < scaled.size:
        scaled[scaled < np.partition(scaled, -spec.top_k)[-spec.top_k]] = LOWEST
    odds: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
    odds /= odds.sum()
    if spec.top_p < 1.0:
        order = np.argsort(-odds, kind="stable")
        before = np.cumsum(odds[order]) - odds[order]
        odds[order[(before >= spec.top_p) & (np.arange(odds.size) > 0)]] = 0.0
        odds /= odds.sum()
    return odds


def choose(
    logits: Floats, text: Sequence[int] | Ints, prompt: int, spec: SamplingSpec, generator: np.random.Generator
) -> int:
    """The next token: the best one (the first among equals), or a draw."""
    logits = adjusted(logits, text, prompt, spec)
    if not spec.do_sample:
        return int(logits.argmax())
    edges = np.cumsum(probabilities(logits, spec))
    return int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))


def generator_of(spec: SamplingSpec, prompt: int) -> np.random.Generator:
    """The source of chance of one prompt of a run."""
    return np.random.default_rng([spec.seed, prompt])
