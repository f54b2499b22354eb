# SPDX-License-Identifier: Apache-2.0
"""How much each expert matters to each token, from what its neurons answer; and how well a gate finds it.

MoEfication (Zhang et al. 2021, arXiv:2110.01786, section 3.3) and its released variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4096  # tokens scored at once

# what of the answers is summed over an expert's neurons; of "plain" the sum's size counts
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda a: a,
    "positive": torch.relu,
    "l1_norm": torch.abs,
    "l2_norm": torch.square,
}


@dataclass(frozen=True)
class GateQuality:
    """How a gate's choice of k experts compares with the k of highest score; means over tokens.

    recall: share of the best k that are chosen. captured, oracle: share of all scores that the chosen and the best k
    have. load_cv: standard deviation over mean of how often experts are chosen; load: the shares themselves.
    """

    recall: float
    captured: float
    oracle: float
    load_cv: float
    load: tuple[float, ...]


def expert_scores(answers: Tensor, mask: Tensor, criterion: str) -> Tensor:
    """float32 scores (T, E) from answers (T, I) and which expert holds which neuron (I, E), 0 or 1.

    The answers stay as they are.
    """
    kind, mask = CRITERIA[criterion], mask.to(torch.float32)
    parts = [kind(part.to(torch.float32)) @ mask for part in answers.split(CHUNK)]
    scores = torch.cat(parts) if parts else answers.new_zeros((0, mask.shape[1]), dtype=torch.float32)
    return scores.abs_() if criterion == "plain" else scores


def output_norms(hidden: Tensor, down: Tensor, experts: tuple[Tensor, ...]) -> Tensor:
    """float32 (T, E): the length of what each expert adds, |D_j h_j|, from h (T, I), D (D, I) and its neurons' ids."""
    found = []
    for part in hidden.split(CHUNK):
        part = part.to(torch.float32)
        found.append(torch.stack([(part[:, ids] @ down[:, ids].T).norm(dim=1) for ids in experts], 1))
    return torch.cat(found) if found else hidden.new_zeros((0, len(experts)), dtype=torch.float32)


def best(scores: Tensor, count: int) -> Tensor:
    """bool (T, E), True for the ``count`` highest of each row; of equal ones the lower number."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def quality(chosen: Tensor, scores: Tensor, count: int) -> GateQuality:
    """Judge a choice (T, E) of ``count`` experts a token by the scores (T, E)."""
    wanted = best(scores, count)
    total = scores.double().sum().clamp(min=1e-30)
    load = chosen.double().mean(0) / count
    return GateQuality(
        recall=float((chosen & wanted).double().sum(1).mean() / count),
        captured=float((scores * chosen).double().sum() / total),
        oracle=float((scores * wanted).double().sum() / total),
        load_cv=float(load.std(unbiased=False) / load.mean()),
        load=tuple(float(share) for share in load),
    )


def centroids(rows: Tensor, experts: tuple[Tensor, ...]) -> Tensor:
    """(E, D): the mean of each expert's rows (I, D), every row made one long before; a row of zeros stays one."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.stack([unit[ids].mean(0) for ids in experts])


def similarity(x: Tensor, centres: Tensor) -> Tensor:
    """MoEfication's gate without training (T, E): minus the distance of x / |x| to each expert's centre."""
    unit = x.to(torch.float32)
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return -torch.cdist(unit, centres)
