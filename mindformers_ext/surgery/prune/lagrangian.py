# SPDX-License-Identifier: Apache-2.0
"""What holds the expected size of a pruned network at its target (Sheared-LLaMA, section 2.1), in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.pruning import ModelShape, PruningSpec
from mindformers_ext.surgery.prune.hard_concrete import Floats, score, sparsity


def penalty(found: npt.ArrayLike, target: float, first: float, second: float) -> float:
    """mean over layers of first (s - t) + second (s - t)^2: every layer is driven to the target, not their mean."""
    gap = np.asarray(found, np.float64) - target
    return float((first * gap + second * gap * gap).mean())


def expected_weights(
    scores: Mapping[str, Floats], shape: ModelShape, counted: tuple[bool, bool] = (True, True)
) -> float:
    """Weights that are left on average, of attention and feed-forward parts where ``counted``.

    Args:
        scores: P(mask > 0) by module; a module without a mask has 1.
        shape: the model's sizes.
        counted: whether attention and the feed-forward part count.
    """
    layers = shape.num_hidden_layers
    ones = np.ones(layers)

    def total(name: str, size: int) -> Floats:
        return scores[name].sum(-1) * ones if name in scores else size * ones

    hidden = float(scores["hidden"].sum()) if "hidden" in scores else float(shape.hidden_size)
    kv = total("head", shape.num_key_value_heads) if "head" in scores else total("kv_head", shape.num_key_value_heads)
    queries = kv * total("q_in_group", shape.heads_per_group)
    attention = 2.0 * hidden * shape.head_dim * (queries + kv)
    mlp = 3.0 * hidden * total("intermediate", shape.intermediate_size)
    whole = scores.get("layer", ones)
    attention = attention * scores.get("head_layer", ones) * whole
    mlp = mlp * scores.get("mlp", ones) * whole
    return float(counted[0] * attention.sum() + counted[1] * mlp.sum())


def overall_sparsity(loga: Mapping[str, npt.ArrayLike], spec: PruningSpec) -> float:
    """Expected share of the prunable weights that go."""
    scores = {name: score(value) for name, value in loga.items()}
    return 1.0 - expected_weights(scores, spec.source, spec.counted()) / spec.prunable()


def lagrangian(
    loga: Mapping[str, npt.ArrayLike], lambdas: Mapping[str, tuple[float, float]], spec: PruningSpec, step: int
) -> float:
    """The penalty of all pairs of multipliers in the update after ``step`` updates."""
    total = 0.0
    for pair, target in zip(spec.pairs, spec.targets(step), strict=True):
        found = sparsity(loga[pair]) if pair else np.asarray(overall_sparsity(loga, spec))
        total += penalty(found, target, *lambdas[pair])
    return total
