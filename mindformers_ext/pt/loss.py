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
    label_T = torch.where(counted_T, target_T, target_T.new_zeros(())).long()
    losses_T = F.cross_entropy(logits_TV.float(), label_T, reduction="none")
    return torch.where(counted_T, losses_T, losses_T.new_zeros(())).sum(), counted_T.sum()
