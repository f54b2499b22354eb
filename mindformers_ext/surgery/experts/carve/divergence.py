# SPDX-License-Identifier: Apache-2.0
"""How far a changed model's predictions are from the dense model's: the divergence of Kullback and Leibler."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def log_shares(states: np.ndarray, norm: np.ndarray, head: np.ndarray, epsilon: float) -> Tensor:
    """float32 (T, V): logarithms of the next token's probabilities, from what leaves the last layer (T, D); ``norm``
    (D) of the last norm, ``head`` (V, D)."""
    x = torch.from_numpy(states)
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon) * torch.from_numpy(norm)
    return torch.log_softmax(x @ torch.from_numpy(head).T, 1)


def divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over the tokens of sum_v p_v (log p_v - log q_v) for log p ``dense`` and log q ``other``, nats."""
    return float((dense.exp() * (dense - other)).sum(dtype=torch.float64))
