# SPDX-License-Identifier: Apache-2.0
"""Neurons to experts by importance: row e says how much each neuron matters on the texts of data cluster e.

Independent experts share nothing: greedily the best pair of expert and neuron that are both free, or the assignment
with the largest sum. Sharing experts take their best neurons each. Residual experts hold the neurons that most experts
want, and every token passes them (LLaMA-MoE, arXiv 2406.16554).
"""

from __future__ import annotations

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.surgery.experts.assign import assign
from mindformers_ext.surgery.experts.split import LayerSplit

CRITERIA = ("max", "min")


def independent_split(scores: np.ndarray, size: int, exact: bool = False) -> LayerSplit:
    """Experts of ``size`` that share no neuron; ``scores`` (E, width), higher is better, size x E = width.

    exact: the largest sum of scores instead of the greedy one; it is never smaller.
    """
    experts, width = _checked(scores)
    if size * experts != width:
        raise UserError(
            f"{experts} experts of {size} neurons are {size * experts}, the layer has {width}: independent experts use "
            f"every neuron once; give --expert_size {width / experts:g}, or share neurons (--share_neurons True)"
        )
    free = np.arange(width)
    return LayerSplit(width, _shared_out(scores, free, size, exact))


def sharing_split(scores: np.ndarray, size: int) -> LayerSplit:
    """Each expert takes its ``size`` best neurons, best first; ``scores`` (E, width), higher is better."""
    _, width = _checked(scores)
    if not 1 <= size <= width:
        raise UserError(f"--expert_size {size} is not between 1 and {width}, the layer's neurons: correct it")
    return LayerSplit(width, tuple(ranking(row)[:size] for row in scores))


def residual_split(scores: np.ndarray, size: int, residual: int, share: bool = True, exact: bool = False) -> LayerSplit:
    """``residual`` experts for all tokens and E routed ones, each of ``size``; ``scores`` (E, width), higher is better.

    Round by round, the neurons that stand among the best ``size`` of most experts become residual (lower ids first
    where not all fit) and leave all rankings. The routed experts take their best of the rest, or with ``share`` False
    share it out (then size x (E + residual) = width).
    """
    experts, width = _checked(scores)
    if residual < 1:
        raise UserError(f"--expert_num_residual {residual} is below 1: give at least one, or leave it out")
    if not share and size * (experts + residual) != width:
        raise UserError(
            f"{experts} + {residual} experts of {size} neurons are {size * (experts + residual)}, the layer has "
            f"{width}: experts that share nothing use every neuron once; correct --expert_size, or share "
            "(--share_neurons True)"
        )
    if size < 1 or size * (residual + 1) > width:
        raise UserError(
            f"{residual} residual experts of {size} neurons leave fewer than {size} of {width} for the routed ones: "
            "give a smaller --expert_size"
        )
    orders = [ranking(row) for row in scores]
    taken = np.zeros(width, bool)
    chosen: list[int] = []
    while len(chosen) < residual * size:
        wanted = np.zeros(width, np.int64)
        for order in orders:
            wanted[order[~taken[order]][:size]] += 1
        most = np.flatnonzero(wanted == wanted.max())[: residual * size - len(chosen)]
        taken[most] = True
        chosen.extend(most.tolist())
    common = tuple(np.split(np.array(chosen), residual))
    if share:
        routed = tuple(order[~taken[order]][:size] for order in orders)
    else:
        routed = _shared_out(scores, np.flatnonzero(~taken), size, exact)
    return LayerSplit(width, routed, common)


def ranking(row: np.ndarray) -> np.ndarray:
    """Neurons by falling score; equal ones by id."""
    return np.argsort(-row.astype(np.float64), kind="stable")


def greedy_labels(scores: np.ndarray, size: int) -> np.ndarray:
    """The expert of each neuron: again and again the best pair of a free neuron and an expert with room.

    Equal scores go to the later expert, of one expert to the lower neuron.
    """
    experts, width = scores.shape
    pair_expert = np.repeat(np.arange(experts), width)
    pair_neuron = np.tile(np.arange(width), experts)
    order = np.lexsort((pair_neuron, -pair_expert, -scores.reshape(-1).astype(np.float64)))
    labels, room = [-1] * width, [size] * experts
    for expert, neuron in zip(pair_expert[order].tolist(), pair_neuron[order].tolist(), strict=True):
        if room[expert] and labels[neuron] < 0:
            labels[neuron] = expert
            room[expert] -= 1
    return np.array(labels)


def _shared_out(scores: np.ndarray, free: np.ndarray, size: int, exact: bool) -> tuple[np.ndarray, ...]:
    part = np.ascontiguousarray(scores[:, free], np.float64)
    if exact:
        labels, _ = assign(part, np.full(len(scores), size))
    else:
        labels = greedy_labels(part, size)
    return tuple(free[labels == expert] for expert in range(len(scores)))


def overlap(split: LayerSplit) -> tuple[np.ndarray, np.ndarray]:
    """How many neurons each two experts share, int64 (n, n), and their share in both together, float64; the residual
    experts first."""
    every = (*split.residual, *split.experts)
    mask = np.zeros((len(every), split.width))
    for place, ids in enumerate(every):
        mask[place, ids] = 1
    count = mask @ mask.T
    sizes = np.diag(count)
    return count.astype(np.int64), count / (sizes + sizes[:, None] - count)


def _checked(scores: np.ndarray) -> tuple[int, int]:
    if scores.ndim != 2 or not scores.size:
        raise UserError(f"importance is a row of scores per expert, found shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise UserError("importance holds NaN or infinity: compute it again")
    return scores.shape[0], scores.shape[1]
