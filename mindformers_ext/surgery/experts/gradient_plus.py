# SPDX-License-Identifier: Apache-2.0
"""Gradient Split Plus (LLaMA-MoE v2, Qu et al. 2024, arXiv:2411.15708): neurons to experts by importance per cluster.

It is the gradient split of LLaMA-MoE but for the order within experts that share nothing beside residual ones: best
first, as the published program appends them.
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.surgery.experts.gradient import independent_split, ranking, residual_split, sharing_split
from mindformers_ext.surgery.experts.split import LayerSplit


def plus_split(
    scores: np.ndarray, size: int, residual: int = 0, share: bool = False, criterion: str = "max"
) -> LayerSplit:
    """The experts of one layer, an expert per row of ``scores`` (E, I), each of ``size`` neurons.

    Args:
        scores: importance of each neuron on the tokens of each cluster, float.
        size: neurons of an expert.
        residual: how many experts' worth of neurons every token passes; they come first, by how many experts want them.
        share: experts may hold the same neurons (never those that every token passes), and some are left out;
            otherwise each neuron is used once.
        criterion: "max" takes the most important neurons first, "min" the least.

    Raises:
        UserError: sizes that do not fit, or values that are no numbers.
    """
    higher = scores if criterion == "max" else -scores
    if not residual:
        return sharing_split(higher, size) if share else independent_split(higher, size)
    found = residual_split(higher, size, residual, share)
    if share:
        return found
    place = [np.argsort(ranking(row)) for row in higher]  # of each neuron in its expert's list
    experts = tuple(ids[np.argsort(place[e][ids])] for e, ids in enumerate(found.experts))
    return LayerSplit(found.width, experts, found.residual)
