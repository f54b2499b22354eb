# SPDX-License-Identifier: Apache-2.0
"""Grouped experts on several devices: rows travel to those that hold their expert's weights, and back.

Devices of ``ep`` hold different experts, those of ``mp`` different columns of one. Over ``ep`` as many rows travel as
the load asks for (``AlltoAllV``, as in MindFormers' grouped experts), so none is dropped and no place is reserved; how
many is exchanged first. Over ``mp`` either all devices have the same rows, whose partial sums are added up (AllReduce),
or under sequence parallel each its own, which are copied to all of them, and of whose results each sums its own. Where
they end a row does not know: every expert multiplies the rows of all senders in one grouped product.

Gradients are those of MindSpore's cut graphs: what several devices hold alike has on each of them a share of its
gradient, and the exchange backward of each exchange adds the shares up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Tensor, nn, ops
from mindspore.communication import create_group, get_rank

from mindformers_ext.ms.strategies import Shards


@dataclass(frozen=True)
class Collectives:
    """Operators between the devices of one group, and the one that makes counts known to the host.

    ``move``: flat rows, rows to each device and rows from each give flat rows; ``swap``: row i of (devices, X) to
    device i; ``gather``: one tensor behind the other; ``add_up``: the sum on every device.
    """

    devices: int
    move: Callable[..., Tensor]
    swap: Callable[..., Tensor]
    gather: Callable[..., Tensor]
    add_up: Callable[..., Tensor]
    to_host: Callable[..., Tensor]


def collectives_along(shards: Shards, axis: str, width: int) -> Collectives | None:
    """The collectives of this process's device along an axis of the stage's box, for rows of ``width``; None along one
    device."""
    count, stride = shards.sizes[axis], 1 if axis == "mp" else shards.mp
    if count == 1:
        return None
    group = _group(count, stride)
    return Collectives(
        count,
        ops.AlltoAllV(group=group, block_size=width),
        # what is known of counts is kept for the backward pass: asking again would cost a message and a wait
        P.AlltoAll(split_count=count, split_dim=0, concat_dim=0, group=group).add_prim_attr("recompute", False),
        P.AllGather(group=group).add_prim_attr("recompute", False),
        P.AllReduce(group=group),
        ops.MoveTo().add_prim_attr("recompute", False),
    )


_made: set[str] = set()


def _group(count: int, stride: int) -> str:
    """The group of ``count`` ranks, ``stride`` apart, that this process is in."""
    rank = get_rank()
    first = rank - rank // stride % count * stride
    name = f"experts_{first}_{count}_{stride}"
    if name not in _made:
        create_group(name, list(range(first, first + count * stride, stride)))
        _made.add(name)
    return name


class MovedRows(nn.Cell):
    """Rows that travel. Inputs: rows of any shape, how many of ``width`` go to each device and come from each (int64,
    on the host), and the shape of the result."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.move = collectives.move

    def construct(self, x: Tensor, sent: Tensor, received: Tensor, shape: tuple[int, ...]) -> Tensor:
        return ops.reshape(self.move(ops.reshape(x, (-1,)), sent, received), shape)

    def bprop(
        self, x: Tensor, sent: Tensor, received: Tensor, shape: tuple[int, ...], out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        dx = ops.reshape(self.move(ops.reshape(dout, (-1,)), received, sent), x.shape)
        return dx, ops.zeros_like(sent), ops.zeros_like(received), shape


class OrderedRows(nn.Cell):
    """Rows (T, D) in another order: that of ``place``, whose inverse is ``back`` (both (T) int32)."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = P.Gather()

    def construct(self, x_TD: Tensor, place_T: Tensor, back_T: Tensor) -> Tensor:
        return self.gather(x_TD, place_T, 0)

    def bprop(
        self, x_TD: Tensor, place_T: Tensor, back_T: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.gather(dout, back_T, 0), ops.zeros_like(place_T), ops.zeros_like(back_T)


class Regrouped(nn.Cell):
    """Where rows that lie by sender and expert are found in the order by expert and sender.

    Inputs: counts (senders, experts) int32, and the numbers 0 to T - 1 of the rows. Output (T) int32: the place of each
    row of the new order in the old one. With the counts transposed it is the inverse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum_up, self.gather = P.CumSum(), P.Gather()

    def construct(self, counts_GE: Tensor, number_T: Tensor) -> Tensor:
        old = ops.reshape(counts_GE, (-1,))
        start_GE = ops.reshape(self.sum_up(old, 0) - old, counts_GE.shape)
        new = ops.reshape(ops.transpose(counts_GE, (1, 0)), (-1,))
        end = self.sum_up(new, 0)
        moved = ops.reshape(ops.transpose(start_GE, (1, 0)), (-1,)) - (end - new)
        # the first pair that ends behind the row; right=True would say so, but spoils later searches on MindSpore's CPU
        pair_1T = ops.searchsorted(ops.expand_dims(end, 0), ops.expand_dims(number_T + 1, 0), out_int32=True)
        return number_T + self.gather(moved, ops.reshape(pair_1T, (-1,)), 0)


class CopiedRows(nn.Cell):
    """Rows (T, D) so many times one after the other."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def construct(self, x_TD: Tensor) -> Tensor:
        return ops.tile(x_TD, (self.copies, 1))

    def bprop(self, x_TD: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.reshape(dout, (self.copies, -1, dout.shape[1])).sum(0),)


class SummedRows(nn.Cell):
    """The sum of so many tensors (T, D) that lie one after the other."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def construct(self, x_TD: Tensor) -> Tensor:
        return ops.reshape(x_TD, (self.copies, -1, x_TD.shape[1])).sum(0)

    def bprop(self, x_TD: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.tile(dout, (self.copies, 1)),)


class ExchangedProducts(nn.Cell):
    """Each row by the weights of its expert, wherever these are.

    Inputs: rows (1, 1, T, D) of this device, sorted by expert, counts (1, E), and of its own experts w1, w3 (E / ep,
    M / mp, D), w2 (E / ep, D, M / mp) and w2's biases (E / ep, D) where it has any. Output: as the rows.

    Args:
        products: multiplies rows of all of a device's experts.
        width: D.
        experts: the collectives between devices of ``ep``, None where each has all experts. With them every expert has
            a row in ``T`` that is no token's (``ms.moe.slots.SortedSlots``), so that no device is left without rows.
        columns: the same of ``mp``.
        own_rows: whether devices of ``mp`` have rows of their own.
    """

    def __init__(
        self, products: nn.Cell, width: int, experts: Collectives | None, columns: Collectives | None, own_rows: bool
    ) -> None:
        super().__init__()
        self.products, self.width = products, width
        self.ep, self.mp = (collectives.devices if collectives else 1 for collectives in (experts, columns))
        self.copies = columns is not None and own_rows
        self.sums = columns is not None and not own_rows
        if experts:
            self.spread, self.swap, self.to_host = MovedRows(experts), experts.swap, experts.to_host
        if columns and own_rows:
            self.share, self.gather, self.to_host = MovedRows(columns), columns.gather, columns.to_host
            self.copied, self.summed = CopiedRows(self.mp), SummedRows(self.mp)
        if columns and not own_rows:
            self.add_up = columns.add_up
        self.regrouped, self.ordered, self.sum_up = Regrouped(), OrderedRows(), P.CumSum()

    def construct(
        self, x_GETD: Tensor, counts_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        counts_GE = ops.reshape(ops.cast(counts_GE, ms.int32), (self.ep, -1))
        if self.ep > 1:
            y = self._spread(x_GETD, counts_GE + 1, w1, w3, w2, bias)
        else:
            y = self._shared(ops.reshape(x_GETD, (-1, self.width)), counts_GE, w1, w3, w2, bias)
        y_GETD = ops.reshape(y, x_GETD.shape)
        return self.add_up(y_GETD) if self.sums else y_GETD

    def _spread(
        self, x_GETD: Tensor, counts_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Rows to the devices of ``ep`` that hold their expert, and back."""
        arriving_GE = self.swap(counts_GE)
        sent, received = self._known(counts_GE), self._known(arriving_GE)
        x_TD = self.spread(x_GETD, sent, received, (-1, self.width))
        y_TD = self._shared(x_TD, arriving_GE, w1, w3, w2, bias)
        return self.spread(y_TD, received, sent, x_GETD.shape)

    def _shared(
        self, x_TD: Tensor, counts_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Rows to all devices of ``mp`` where each has its own, and the sums of their products back."""
        if not self.copies:
            return self._multiplied(x_TD, counts_GE, w1, w3, w2, bias)
        all_GE = self.gather(counts_GE)
        received = self._known(ops.reshape(all_GE, (self.mp, -1)))
        sent = self._known(ops.tile(ops.reshape(counts_GE, (1, -1)), (self.mp, 1)))
        all_TD = self.share(self.copied(x_TD), sent, received, (-1, self.width))
        y_TD = self._multiplied(all_TD, all_GE, w1, w3, w2, bias)
        return self.summed(self.share(y_TD, received, sent, (-1, self.width)))

    def _multiplied(
        self, x_TD: Tensor, counts_GE: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The products of rows by sender and expert; biases once in all of ``mp``, since their results are added."""
        if bias is not None:
            bias = bias / self.mp
        count_E = ops.cast(counts_GE.sum(0), ms.int32)
        if counts_GE.shape[0] == 1:
            return self.products.of_rows(x_TD, count_E, w1, w3, w2, bias)
        number_T = self.sum_up(ops.ones_like(ops.cast(ops.stop_gradient(x_TD)[:, 0], ms.int32)), 0) - 1
        place_T = self.regrouped(counts_GE, number_T)
        back_T = self.regrouped(ops.transpose(counts_GE, (1, 0)), number_T)
        y_TD = self.products.of_rows(self.ordered(x_TD, place_T, back_T), count_E, w1, w3, w2, bias)
        return self.ordered(y_TD, back_T, place_T)

    def _known(self, counts_GE: Tensor) -> Tensor:
        """Each row's sum, int64, where the host can read them."""
        return self.to_host(ops.cast(counts_GE.sum(1), ms.int64), "CPU", True)
