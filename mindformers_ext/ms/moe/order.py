# SPDX-License-Identifier: Apache-2.0
"""Assignments sorted by expert: one sort of unique int32 keys ``expert * kN + order``.

It takes O(kN) memory and is exact while ``E * kN < 2**31`` (MindFormers' float32 one-hot cumulative sum needs O(kNE)
and is exact only below 2**24).
"""

from __future__ import annotations

import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

INT32_LIMIT = 2**31


class ExpertOrder(nn.Cell):
    """Sorts assignments by expert, keeping their drop order inside each expert.

    Input: expert of each assignment in drop order (G, kN) int32. Outputs: the drop-order ids sorted by expert
    (G, kN), position of every assignment inside its expert (G, kN) from 0, counts (G, E), starts (G, E); all int32.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.first_E = Tensor(np.arange(experts, dtype=np.int32)[None])
        self.sort = P.Sort()
        self.gather = P.Gather(batch_dims=1)

    def construct(self, expert_GT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        G, kN = expert_GT.shape
        order_T = ops.reshape(Tensor(np.arange(kN, dtype=np.int32)), (1, kN))
        keys, _ = self.sort(expert_GT * kN + order_T)
        first_key_GE = ops.tile(self.first_E * kN, (G, 1))
        starts_GE = ops.searchsorted(keys, first_key_GE, out_int32=True)
        counts_GE = ops.searchsorted(keys, first_key_GE + kN, out_int32=True) - starts_GE
        sorted_GT = keys % kN
        # The ids are a permutation: the places that sort them back are the ranks.
        _, rank_GT = self.sort(sorted_GT)
        position_GT = rank_GT - self.gather(starts_GE, expert_GT, 1)
        return sorted_GT, position_GT, counts_GE, starts_GE


def check_load(assignments: int, experts: int, max_router_load: int, empty: int = 0) -> None:
    """Refuse sizes that the integer keys, or the user's own limit, do not hold. ``empty``: places sorted with them."""
    if assignments > max_router_load:
        raise ValueError(
            f"{assignments} assignments per routing group exceed max_router_load={max_router_load}: "
            "raise moe_config.max_router_load or shorten the batch"
        )
    if experts * (assignments + empty) >= INT32_LIMIT:
        raise ValueError(f"{experts} experts x {assignments} assignments do not fit 32-bit keys: use more groups")
