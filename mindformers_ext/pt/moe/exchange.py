# SPDX-License-Identifier: Apache-2.0
"""Expert parallel: rows travel to the rank that holds their expert, and back (GShard, Lepikhin et al. 2020, 3.2).

Capacity is applied before, on the sender's own tokens, so what is dropped never travels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group: ``sent`` rows go to each, ``received`` come from each; backward the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        out = rows.new_empty((sum(received), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        out = gradients[0].new_empty((sum(sent), gradients[0].shape[1]))
        dist.all_to_all_single(out, gradients[0].contiguous(), sent, received, group=ctx.group)
        return out, None, None, None


class ExpertExchange:
    """Runs experts that are spread over a group; rank i of it holds the i-th part of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, rows: Tensor, offs_E: Tensor, experts: nn.Module) -> Tensor:
        """As ``experts(rows, offs_E)`` with all experts at hand; rows behind the last offset come back as zeros."""
        count_E = torch.diff(offs_E, prepend=offs_E.new_zeros(1))
        arriving = torch.empty_like(count_E)
        dist.all_to_all_single(arriving, count_E, group=self.group)
        table = torch.stack((count_E, arriving)).view(2, self.size, -1)
        sent, received = table.sum(-1).tolist()  # the one read on the host
        place, offs = _by_expert(table[1])
        mine = _AllToAll.apply(rows[: sum(sent)], sent, received, self.group)
        done = experts(mine.index_select(0, place), offs)
        back = torch.empty_like(place)
        back[place] = torch.arange(len(place), device=place.device)
        home = _AllToAll.apply(done.index_select(0, back), received, sent, self.group)
        return torch.cat((home, home.new_zeros((rows.shape[0] - home.shape[0], home.shape[1]))))


def _by_expert(arriving: Tensor) -> tuple[Tensor, Tensor]:
    """Order of received rows by expert, and the experts' end offsets, from counts (sender, local expert)."""
    senders, experts = arriving.shape
    expert = torch.arange(experts, device=arriving.device).repeat(senders).repeat_interleave(arriving.reshape(-1))
    return torch.sort(expert, stable=True).indices, arriving.sum(0).cumsum(0).to(torch.int32)
