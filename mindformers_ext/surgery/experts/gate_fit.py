# SPDX-License-Identifier: Apache-2.0
"""Gates that choose experts, fitted to scores: by training, or in closed form (ridge regression)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mindformers_ext.surgery.experts.scores import GateQuality, best, quality
from mindformers_ext.surgery.experts.words import FIRST, LINEAR, NOISE, ONLY, SECOND
from mindformers_ext.surgery.ridge import factor, solve

SPREAD = 0.5  # standard deviation of what enters tanh, from ridge rows: they decide, and are not yet cut off
GAIN = 4.0  # of the second layer behind them: logits as large as those of a trained gate, so that none unlearns first
NOISE_EPSILON = 1e-2
PLATEAU = {"factor": 0.9, "threshold": 0.05, "patience": 10}
JUDGED = 1 << 16  # tokens whose logits are made at once


@dataclass(frozen=True)
class GateTraining:
    """How a gate is trained. ``selects``: k. ``softmax``: towards the scores' softmax (Kullback-Leibler), else towards
    1 for the best k (binary cross entropy). ``patience``: epochs without a better recall before it stops."""

    selects: int
    lr: float = 1e-2
    epochs: int = 100
    batch: int = 1024
    patience: int = 15
    softmax: bool = False
    balance: float = 0.0
    noise: bool = False
    seed: int = 0


@dataclass
class Curve:
    """Loss and recall by epoch; validation's first entry is the gate before training, epoch 0."""

    train_epochs: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_acc: list[float] = field(default_factory=list)
    valid_epochs: list[int] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_acc: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FittedGate:
    """A gate's weights by their names in a state dict, how it went, and the epoch they are of."""

    weights: dict[str, Tensor]
    curve: Curve
    epoch: int
    loss: float


@dataclass(frozen=True)
class GateData:
    """Tokens x (T, D) of any float type, and scores (T, E) float32, of one layer."""

    x: Tensor
    scores: Tensor

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them, x as float32."""
        return self.x[index].to(torch.float32), self.scores[index]


def logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Scores of the experts (T, E) for x (T, D): W2 tanh(W1 x), or W x."""
    x = x.to(torch.float32)
    if ONLY in weights:
        return x @ weights[ONLY].T
    return torch.tanh(x @ weights[FIRST].T) @ weights[SECOND].T


def all_logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same for any number of tokens, a part at a time."""
    return torch.cat([logits(weights, part) for part in x.split(JUDGED)])


def first_weights(kind: str, rows: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
    """A gate before training that chooses as ``rows`` (E, D) alone do: the second layer is ``gain`` times the identity,
    and tanh keeps the order."""
    rows, count = rows.clone(), len(rows)
    if kind == LINEAR:
        return {ONLY: gain * rows}
    return {FIRST: rows, SECOND: gain * torch.eye(count)}


def first_rows(
    init: str, centres: Tensor, data: GateData, selects: int, damping: float, generator: torch.Generator
) -> Tensor:
    """The rows (E, D) that a gate starts from.

    "ridge": those that predict the best k (``ridge_targets``). "weight": the experts' ``centres``
    (E, D). "random": drawn from N(0, 1).
    """
    if init == "weight":
        return centres
    if init == "random":
        return torch.randn(centres.shape, generator=generator)
    sums = RidgeSums(*reversed(centres.shape))
    sums.add(data.x, ridge_targets(data.scores, selects, "chosen"))
    rows = sums.solve(damping)
    seen = all_logits({ONLY: rows}, data.x[: 4 * JUDGED])
    return rows * (SPREAD / float(seen.std().clamp(min=1e-12)))


def target_loss(found: Tensor, scores: Tensor, how: GateTraining) -> Tensor:
    """The mean loss of logits (T, E): per token and expert, or with ``softmax`` per token."""
    if how.softmax:
        return F.kl_div(found.log_softmax(1), scores.log_softmax(1), reduction="batchmean", log_target=True)
    return F.binary_cross_entropy_with_logits(found, best(scores, how.selects).to(torch.float32))


def balance_loss(found: Tensor, selects: int) -> Tensor:
    """Squared coefficient of variation of the experts' summed gate values (Shazeer et al. 2017, arXiv:1701.06538,
    equation 7), values being the softmax over the chosen k; 0 for one expert."""
    if found.shape[1] == 1:
        return found.new_zeros(())
    top, place = found.topk(selects, dim=1)
    importance = torch.zeros_like(found).scatter(1, place, top.softmax(1)).sum(0)
    return importance.var() / (importance.mean() ** 2 + 1e-10)


def train_gate(
    start: dict[str, Tensor],
    train: GateData,
    valid: GateData,
    how: GateTraining,
    tell: Callable[[int], object] = lambda epoch: None,
) -> FittedGate:
    """Train with AdamW; the weights of the epoch with the best recall on ``valid``, the earliest of equal ones."""
    generator = torch.Generator().manual_seed(how.seed)
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    if how.noise:
        rows = next(iter(start.values()))
        weights[NOISE] = torch.zeros(rows.shape[0], rows.shape[1]).requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=0.01 * how.lr, **PLATEAU)
    curve, kept = Curve(), _copy(weights)
    recall, loss = _judge(weights, valid, how)
    _note(curve.valid_epochs, curve.valid_loss, curve.valid_acc, 0, loss, recall)
    top, epoch_of_best, loss_of_best = recall, 0, loss
    for epoch in range(1, how.epochs + 1):
        train_loss, train_recall = _epoch(weights, optimizer, train, how, generator)
        schedule.step(train_loss)
        recall, loss = _judge(weights, valid, how)
        _note(curve.train_epochs, curve.train_loss, curve.train_acc, epoch, train_loss, train_recall)
        _note(curve.valid_epochs, curve.valid_loss, curve.valid_acc, epoch, loss, recall)
        tell(epoch)
        if recall > top:
            top, epoch_of_best, loss_of_best, kept = recall, epoch, loss, _copy(weights)
        elif epoch - epoch_of_best >= how.patience:
            break
    return FittedGate(kept, curve, epoch_of_best, loss_of_best)


def _epoch(
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    train: GateData,
    how: GateTraining,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Mean loss and recall of one pass over the tokens in a new order."""
    total, hits, count = 0.0, 0, len(train.x)
    for index in torch.randperm(count, generator=generator).split(how.batch):
        x, scores = train.rows(index)
        plain = logits(weights, x)
        found = plain
        if how.noise:
            spread = F.softplus(x @ weights[NOISE].T) + NOISE_EPSILON
            found = plain + torch.randn(plain.shape, generator=generator) * spread
        loss = target_loss(found, scores, how)
        if how.balance:
            loss = loss + how.balance * balance_loss(found, how.selects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(index)
        hits += int((best(plain.detach(), how.selects) & best(scores, how.selects)).sum())
    return total / count, hits / (count * how.selects)


def _judge(weights: dict[str, Tensor], data: GateData, how: GateTraining) -> tuple[float, float]:
    with torch.no_grad():
        found = all_logits(weights, data.x)
        wanted = best(data.scores, how.selects)
        hits = (best(found, how.selects) & wanted).sum(1).double().mean()
        return float(hits / how.selects), float(target_loss(found, data.scores, how))


def _note(epochs: list[int], losses: list[float], recalls: list[float], epoch: int, loss: float, recall: float) -> None:
    epochs.append(epoch)
    losses.append(loss)
    recalls.append(recall)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def ridge_targets(norms: Tensor, selects: int, kind: str) -> Tensor:
    """What a ridge gate predicts (T, E) from the lengths of what experts add.

    "chosen": 1 for the k that add most and 0 for the others, less the mean k / E. "norm": the lengths, each token's in
    relation to all of its own, so that tokens of massive activations do not rule.
    """
    if kind == "chosen":
        return best(norms, selects).to(torch.float32) - selects / norms.shape[1]
    return norms / norms.norm(dim=1, keepdim=True).clamp(min=1e-12)


class RidgeSums:
    """X'X and X'T, gathered part by part in float64."""

    def __init__(self, width: int, experts: int) -> None:
        self.squares = torch.zeros(width, width, dtype=torch.float64)
        self.products = torch.zeros(width, experts, dtype=torch.float64)

    def add(self, x: Tensor, targets: Tensor) -> None:
        """Tokens (T, D) and their targets (T, E)."""
        for part, target in zip(x.split(JUDGED), targets.split(JUDGED), strict=True):
            part = part.to(torch.float32)
            self.squares += (part.T @ part).double()
            self.products += (part.T @ target).double()

    def solve(self, damping: float) -> Tensor:
        """The gate (E, D): (X'X + damping * mean(diag X'X) I)^-1 X'T, without an intercept, which stock files lack."""
        lower, _ = factor(self.squares.clone().numpy(), damping)
        return torch.from_numpy(solve(lower, self.products.clone().numpy())).T.to(torch.float32).contiguous()


def judge_gate(weights: dict[str, Tensor], data: GateData, selects: int) -> GateQuality:
    """How the gate's choice of k compares with the scores."""
    with torch.no_grad():
        return quality(best(all_logits(weights, data.x), selects), data.scores, selects)
