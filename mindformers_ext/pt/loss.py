# SPDX-License-Identifier: Apache-2.0
"""Next-token cross entropy over the tokens that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def targets(ids_BT: Tensor, labels_BT: Tensor | None, pad_token_id: int, ignore_token_id: int) -> tuple[Tensor, Tensor]:
    """target (B*S) and counted (B*S) bool of ids and labels (B, S+1).

    Not counted: a token that is padding, and a target that is to be ignored.
    """
    target_BS = (ids_BT if labels_BT is None else labels_BT)[:, 1:]
    counted = (ids_BT[:, :-1] != pad_token_id) & (target_BS != ignore_token_id)
    return target_BS.reshape(-1), counted.reshape(-1)


def next_token_loss(logits_TV: Tensor, target_T: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum () of the cross entropy over counted tokens, in float32, and their number ()."""
    return token_losses(logits_TV, target_T, counted_T).sum(), counted_T.sum()


def token_losses(logits_TV: Tensor, target_T: Tensor, counted_T: Tensor) -> Tensor:
    """The cross entropy (T) of counted tokens in float32, 0 of others."""
    label_T = torch.where(counted_T, target_T, target_T.new_zeros(())).long()
    losses_T = F.cross_entropy(logits_TV.float(), label_T, reduction="none")
    return torch.where(counted_T, losses_T, losses_T.new_zeros(()))


def preference_loss(logp_B: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss () of ``core.preferences`` and ``core.figures.MEASURED`` (2).

    Inputs: log-probabilities of all chosen answers, then of the rejected ones (2R), and the reference's (R, 2).
    """
    chosen, rejected = logp_B.chunk(2)
    margin = beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
    measured = torch.stack(((margin > 0).float().mean(), margin.mean())).detach()
    return -F.logsigmoid(margin).mean(), measured
