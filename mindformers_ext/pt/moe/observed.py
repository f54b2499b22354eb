# SPDX-License-Identifier: Apache-2.0
"""What each expert of a mixture adds to each token, for a probe: nothing here is on a network's way."""

from __future__ import annotations

import torch
from torch import Tensor

from mindformers_ext.pt.feed_forward import FeedForward
from mindformers_ext.pt.moe.noisy_gate import NoisyMlpGate
from mindformers_ext.pt.ops.rows import dispatch, sort_by_expert


def observed(feed_forward: FeedForward, x_TD: Tensor) -> dict[str, Tensor]:
    """``core.layers.MIXTURE_POINTS`` (T, E) of the routed experts, for the input of the feed-forward part."""
    (moe,) = feed_forward.mixtures()
    weight_GTK, expert_GTK = moe.router.choose(x_TD[None])
    expert_TK = expert_GTK[0]
    place = sort_by_expert(expert_TK, moe.filled(expert_TK), moe.experts)
    rows = moe.ffn(dispatch(x_TD, place), place.offs_E)
    norm_TK = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)[place.row_TK]

    def spread(value_TK: Tensor) -> Tensor:
        empty_TE = value_TK.new_zeros(len(x_TD), moe.experts + 1)  # E: of empty places
        return empty_TE.scatter(1, expert_TK, value_TK)[:, : moe.experts]

    found = {
        "chosen": spread(torch.ones_like(norm_TK)),
        "gate_weights": spread(weight_GTK[0]),
        "expert_norms": spread(norm_TK),
    }
    if isinstance(moe.router, NoisyMlpGate):
        found["gate_hidden"] = torch.tanh(moe.router.dense(x_TD))
    return found
