# SPDX-License-Identifier: Apache-2.0
"""One layer's gate, from numpy arrays to numpy arrays: scores of its features, the fit, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindformers_ext.surgery.experts.gate_fit import (
    GAIN,
    Curve,
    FittedGate,
    GateData,
    GateTraining,
    RidgeSums,
    first_rows,
    first_weights,
    judge_gate,
    ridge_targets,
    target_loss,
    train_gate,
)
from mindformers_ext.surgery.experts.gate_fit import all_logits as gate_logits
from mindformers_ext.surgery.experts.scores import best, centroids, expert_scores, output_norms, quality, similarity
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import LINEAR, MLP, ONLY, RIDGE

Array = np.ndarray


@dataclass(frozen=True)
class GateWish:
    """Which gate: ``kind`` of ``words.KINDS``, its first weights, how it is trained; of the ridge gate what it
    predicts (``words.TARGETS``) and its damping."""

    kind: str
    init: str
    training: GateTraining
    damping: float
    target: str = "chosen"


@dataclass(frozen=True)
class LayerTokens:
    """A layer's tokens x (T, D) and scores (T, E); ``targets`` (T, E) are |D_j h_j|, for the ridge gate alone. The
    first ``train`` of them fit the gate, the others judge it."""

    x: Array
    scores: Array
    train: int
    targets: Array | None = None


def scores_of(answers: Array, split: LayerSplit, criterion: str) -> Array:
    """float32 (T, E): see ``scores.expert_scores``."""
    return expert_scores(_tensor(answers), torch.from_numpy(split.mask()), criterion).numpy()


def norms_of(hidden: Array, down: Array, split: LayerSplit) -> Array:
    """float32 (T, E): see ``scores.output_norms``; ``hidden`` is silu(gate) * up (T, F), ``down`` (D, F)."""
    return output_norms(_tensor(hidden), _tensor(down), _experts(split)).numpy()


def hidden_of(gate: Array, x: Array, up: Array) -> Array:
    """float32 (T, F): silu(gate) * up from silu(gate) (T, F), the input (T, D) and the matrix of up (F, D)."""
    return (_tensor(gate).float() * (_tensor(x).float() @ _tensor(up).T)).numpy()


def fit_gate(tokens: LayerTokens, rows: Array, split: LayerSplit, wish: GateWish) -> tuple[dict[str, Array], dict]:
    """The gate's weights by their names in a state dict, and its figures.

    Args:
        tokens: what it is fitted to and judged by.
        rows: the matrix (F, D) whose rows tell what an expert answers to.
        split: the experts.
        wish: which gate.

    Returns:
        Weights, and recall, captured, oracle, load_cv, load of the judged tokens; the same (without load) of
        ``baselines``: "random", and "similarity", MoEfication's gate without training; loss, epoch and curve.
    """
    with one_thread():
        centres = centroids(_tensor(rows), _experts(split))
        train, valid = _halves(tokens)
        how = wish.training
        fitted = _ridge(tokens, valid, wish) if wish.kind == RIDGE else _trained(wish, centres, train, valid)
        found = judge_gate(fitted.weights, valid, how.selects)
        near = quality(best(_similarity(valid.x, centres), how.selects), valid.scores, how.selects)
        chance = how.selects / len(split.experts)
        figures: dict[str, Any] = {
            **asdict(found),
            "baselines": {
                "random": {"recall": chance, "captured": chance, "load_cv": 0.0},
                "similarity": {key: value for key, value in asdict(near).items() if key not in ("load", "oracle")},
            },
            "loss": fitted.loss,
            "epoch": fitted.epoch,
            "tokens": {"train": len(train.x), "valid": len(valid.x)},
            "curve": asdict(fitted.curve),
        }
        return {name: weight.numpy() for name, weight in fitted.weights.items()}, figures


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread: the same sums in the same order, wherever and beside whatever a gate is fitted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trained(wish: GateWish, centres: Tensor, train: GateData, valid: GateData) -> FittedGate:
    generator = torch.Generator().manual_seed(wish.training.seed)
    rows = first_rows(wish.init, centres, train, wish.training.selects, wish.damping, generator)
    start = first_weights(LINEAR if wish.kind == LINEAR else MLP, rows, GAIN if wish.init == "ridge" else 1.0)
    return train_gate(start, train, valid, wish.training)


def _ridge(tokens: LayerTokens, valid: GateData, wish: GateWish) -> FittedGate:
    if tokens.targets is None:
        raise ValueError("the ridge gate needs the length of what each expert adds")
    sums = RidgeSums(tokens.x.shape[1], tokens.scores.shape[1])
    wanted = ridge_targets(_tensor(tokens.targets[: tokens.train]), wish.training.selects, wish.target)
    sums.add(_tensor(tokens.x[: tokens.train]), wanted)
    weights: Mapping[str, Tensor] = {ONLY: sums.solve(wish.damping)}
    loss = float(target_loss(gate_logits(dict(weights), valid.x), valid.scores, wish.training))
    recall = judge_gate(dict(weights), valid, wish.training.selects).recall
    curve = Curve(valid_epochs=[0], valid_loss=[loss], valid_acc=[recall])
    return FittedGate(dict(weights), curve, 0, loss)


def _similarity(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([similarity(part, centres) for part in x.split(1 << 14)])


def _halves(tokens: LayerTokens) -> tuple[GateData, GateData]:
    x, scores, at = _tensor(tokens.x), _tensor(tokens.scores), tokens.train
    return GateData(x[:at], scores[:at]), GateData(x[at:], scores[at:])


def _experts(split: LayerSplit) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(ids) for ids in split.experts)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
