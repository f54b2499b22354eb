# SPDX-License-Identifier: Apache-2.0
"""First weights of a router from what each expert's prompts look like: one row per layer and expert.

Source of the modes: mergekit-moe's documentation. A row points to where the expert's prompts lie: the product of a
token's state with the row of its expert is large, so the router sends it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SHORTEST = 1e-8  # sums shorter than this are not normalised


def cheap_embedding(embeddings: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """The direction of a list of prompts: the sum of their tokens' embeddings (prompts, tokens, hidden), length 1."""
    kept = torch.from_numpy(embeddings).float() * torch.from_numpy(mask).unsqueeze(-1)
    total = kept.sum(dim=1).sum(dim=0, keepdim=True)
    return unit(total)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` of length 1."""
    return rows / rows.norm(dim=-1, p=2, keepdim=True).clamp(min=SHORTEST)


def cheap_row(positive: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
    """(1, hidden): towards the positive prompts and away from the negative ones."""
    return unit(positive if negative is None else positive - negative)


def prompt_states(states: Sequence[Any], mask: np.ndarray, average: bool) -> torch.Tensor:
    """(layers, hidden): the mean over prompts of the state of the last token, or of the mean over its own tokens.

    ``states``: per layer a tensor (prompts, tokens, hidden); prompts are padded on the left.
    """
    stacked = torch.stack(list(states))
    if average:
        kept = torch.from_numpy(mask).to(stacked.dtype)[None, :, :, None]
        pooled = (stacked * kept).sum(dim=2) / kept.sum(dim=2)
    else:
        pooled = stacked[:, :, -1, :]
    return pooled.sum(dim=1) / pooled.shape[1]


def hidden_rows(positive: torch.Tensor, negative: torch.Tensor | None) -> np.ndarray:
    """(layers, hidden) float32 of length 1: towards the positive prompts and away from the negative ones."""
    rows = positive if negative is None else positive - negative
    return unit(rows).float().numpy()
