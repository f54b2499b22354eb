# SPDX-License-Identifier: Apache-2.0
"""Ways to choose experts for every token of a layer, as weights (T, E) of their outputs: oracle, gate, chance; and the
neurons that a static cut keeps. Numpy in and out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mindformers_ext.surgery.experts.gate_fit import logits
from mindformers_ext.surgery.experts.scores import best, expert_scores
from mindformers_ext.surgery.experts.split import LayerSplit


def by_answers(hidden: np.ndarray, split: LayerSplit, count: int) -> np.ndarray:
    """1 for the ``count`` experts with the largest sums of squares of their neurons' answers (T, F), else 0."""
    scores = expert_scores(torch.from_numpy(hidden), torch.from_numpy(split.mask()), "l2_norm")
    return best(scores, count).numpy().astype(np.float32)


def by_chance(generator: np.random.Generator, tokens: int, experts: int, count: int) -> np.ndarray:
    """1 for ``count`` experts drawn for each token, else 0."""
    return best(torch.from_numpy(generator.random((tokens, experts))), count).numpy().astype(np.float32)


def by_gate(
    x: np.ndarray, gate: Mapping[str, np.ndarray], count: int, *, softmax: bool, multiply: bool, factor: float
) -> np.ndarray:
    """As a LLaMA-MoE's gate decides (arXiv:2406.16554): 1 for the chosen without ``multiply``, else the logit or, with
    ``softmax``, its share among the chosen, times ``factor``; 0 for the others. ``x``: (T, D)."""
    found = logits({name: torch.from_numpy(array) for name, array in gate.items()}, torch.from_numpy(x))
    chosen = best(found, count)
    if not multiply:
        return chosen.numpy().astype(np.float32)
    score = torch.softmax(found.masked_fill(~chosen, -torch.inf), 1) if softmax else found * chosen
    return (score * factor).numpy().astype(np.float32)


def kept_neurons(total: np.ndarray, count: int) -> np.ndarray:
    """bool (F): the ``count`` neurons of highest ``total``; of equal ones the lower number."""
    return best(torch.from_numpy(total)[None], count)[0].numpy()
