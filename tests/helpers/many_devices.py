# SPDX-License-Identifier: Apache-2.0
"""Several devices of an expert layer in one process: each runs its own cell and differentiates it by itself, what the
operators between devices would move lies on a board.

The devices take turns. An operator gives what the others have put on the board for the same call, and something of the
right shape where they have not yet; turns are repeated until nothing on the board changes and no such stand-in was
given. So a device sees what it would see, forward and backward, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn

from mindformers_ext.ms.moe.exchange import Collectives

TURNS = 30


class Board:
    """What each device has given in each of its calls."""

    def __init__(self) -> None:
        self.device = 0
        self.calls = 0
        self.given: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.is_settled = False

    def settle(self, devices: int, turn: Callable[[int], None]) -> None:
        """Let the devices take turns until all have seen all."""
        for _ in range(TURNS):
            self.is_settled = True
            for self.device in range(devices):
                self.calls = 0
                turn(self.device)
            if self.is_settled:
                return
        raise AssertionError(f"{devices} devices still wait for each other after {TURNS} turns")

    def give(self, value: np.ndarray, counts: np.ndarray | None = None) -> int:
        """Put the running device's value up; returns the number of its call."""
        counts = np.zeros(0) if counts is None else counts
        key, self.calls = (self.device, self.calls), self.calls + 1
        old = self.given.get(key)
        if old is None or old[0].shape != value.shape or (old[0] != value).any() or (old[1] != counts).any():
            self.is_settled = False
        self.given[key] = value.copy(), counts.copy()  # MindSpore's memory is used again
        return key[1]

    def taken(self, device: int, call: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What ``device`` has given in its call of this number."""
        found = self.given.get((device, call))
        self.is_settled &= found is not None
        return found


class Sum(nn.Cell):
    """AllReduce, whose gradient is AllReduce."""

    def __init__(self, board: Board, members: list[int]) -> None:
        super().__init__()
        self.board, self.members = board, members

    def total(self, x: Tensor) -> Tensor:
        """Of all members' tensors."""
        own = x.asnumpy()
        call = self.board.give(own)
        found = [self.board.taken(member, call) for member in self.members]
        return Tensor(sum(own if each is None else each[0] for each in found).astype(own.dtype))

    def construct(self, x: Tensor) -> Tensor:
        return self.total(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.total(dout),)


def collectives_between(board: Board, members: list[int], device: int, width: int) -> Collectives | None:
    """The operators of ``device`` in the group ``members``, as ``exchange.collectives_along`` makes them."""
    place = members.index(device)

    def move(flat: Tensor, sent: Tensor, received: Tensor) -> Tensor:
        rows, counts = flat.asnumpy(), sent.asnumpy()
        assert len(rows) == counts.sum() * width, (len(rows), counts, width)
        call, parts = board.give(rows, counts), []
        for member, count in zip(members, received.asnumpy(), strict=True):
            part, found = np.ones(count * width, rows.dtype), board.taken(member, call)
            if found is not None:
                ends = np.cumsum(found[1]) * width
                arrived = found[0][ends[place] - found[1][place] * width : ends[place]]
                board.is_settled &= len(arrived) == len(part)
                part = arrived if len(arrived) == len(part) else part
            parts.append(part)
        return Tensor(np.concatenate(parts))

    def swap(counts: Tensor) -> Tensor:
        own = counts.asnumpy()
        call = board.give(own)
        found = [board.taken(member, call) for member in members]
        return Tensor(np.stack([(own if each is None else each[0])[place] for each in found]))

    def gather(counts: Tensor) -> Tensor:
        own = counts.asnumpy()
        call = board.give(own)
        found = [board.taken(member, call) for member in members]
        return Tensor(np.concatenate([own if each is None else each[0] for each in found]))

    if len(members) == 1:
        return None
    return Collectives(len(members), move, swap, gather, Sum(board, members), lambda counts, place, waits: counts)
