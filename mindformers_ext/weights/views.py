# SPDX-License-Identifier: Apache-2.0
"""A target tensor as a picture of stored ones: which rows of which file, in which order. No data, until streamed.

A leaf (``Slab``) is a box of one stored tensor, maybe with its last two axes swapped; leaves are stacked, joined and
interleaved. Building simplifies (a tensor taken apart and put together again is the tensor), and streaming reads
blocks of a bounded number of elements, so memory does not grow with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, TypeAlias, cast

import numpy as np

from mindformers_ext.formats.tensors import Array, Index
from mindformers_ext.weights.transpose import shaped, transpose_bands

Shape = tuple[int, ...]
Range = tuple[int, int, int]
"""Start, stop, step."""
BLOCK = 2**20  # elements of one block: 2 MiB of 16-bit numbers stay near the processor
ROWS = 32  # a multiple of rows that are turned at once
STRIP = 2**26  # elements held while a matrix is turned: one expert of Mixtral-8x7B (58.7 M) at a time


@dataclass(frozen=True)
class Slab:
    """A box of the stored tensor ``name``: a range per stored axis.

    The first ``dropped`` axes are one wide and gone. With ``swapped`` the last two axes change places.
    """

    name: str
    ranges: tuple[Range, ...]
    dropped: int = 0
    swapped: bool = False

    @property
    def shape(self) -> Shape:
        """The shape as seen from above."""
        sizes = [-((start - stop) // step) for start, stop, step in self.ranges[self.dropped :]]
        if self.swapped:
            sizes[-2:] = sizes[:-3:-1]
        return tuple(sizes)


@dataclass(frozen=True)
class Stacked:
    """Equal views on a new first axis."""

    parts: tuple[View, ...]

    @property
    def shape(self) -> Shape:
        """(number of parts, shape of each)."""
        return (len(self.parts), *self.parts[0].shape)


@dataclass(frozen=True)
class Joined:
    """Views one after the other along the first axis."""

    parts: tuple[View, ...]

    @property
    def shape(self) -> Shape:
        """The first axes added up."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


@dataclass(frozen=True)
class Interleaved:
    """Equal slabs whose rows alternate: row 0 of each, row 1 of each, and so on."""

    parts: tuple[Slab, ...]

    @property
    def shape(self) -> Shape:
        """The first axis times the number of parts."""
        return (len(self.parts) * self.parts[0].shape[0], *self.parts[0].shape[1:])


@dataclass(frozen=True)
class Beside:
    """Matrices of equally many rows, their columns one after the other."""

    parts: tuple[Slab, ...]

    @property
    def shape(self) -> Shape:
        """Rows, and all columns."""
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))


@dataclass(frozen=True)
class Padded:
    """A view in the first corner of a larger shape, zeros elsewhere."""

    part: View
    shape: Shape

    @property
    def parts(self) -> tuple[View]:
        """The one that it holds."""
        return (self.part,)


View: TypeAlias = "Slab | Stacked | Joined | Interleaved | Beside | Padded"


class BlockSource(Protocol):
    """Where a stream takes its data from."""

    def read(self, name: str, index: Index) -> Array:
        """The part ``index`` of a stored tensor, as stored."""

    def finish(self, name: str, block: Array) -> Array:
        """``block``, made of data of ``name``, in the type that leaves the stream."""


def whole(name: str, shape: Shape) -> Slab:
    """All of a stored tensor."""
    return Slab(name, tuple((0, size, 1) for size in shape))


def matrix(view: View, place: int) -> View:
    """``view[place]``; of a stack of vectors, a vector."""
    if isinstance(view, Stacked):
        return view.parts[place]
    if not isinstance(view, Slab) or len(view.shape) < (3 if view.swapped else 2):
        raise ValueError(f"no matrix is taken out of {view}")
    at = range(*view.ranges[view.dropped])[place]
    return replace(view, ranges=_with(view.ranges, view.dropped, (at, at + 1, 1)), dropped=view.dropped + 1)


def part(view: View, axis: int, start: int, stop: int) -> View:
    """``view[..., start:stop]`` along ``axis``."""
    if isinstance(view, Joined) and axis == 0:
        pieces, position = [], 0
        for piece in view.parts:
            size = piece.shape[0]
            low, high = max(start - position, 0), min(stop - position, size)
            if low < high:
                pieces.append(part(piece, 0, low, high))
            position += size
        return join(pieces)
    if isinstance(view, Stacked) and axis > 0:
        return stack([part(piece, axis - 1, start, stop) for piece in view.parts])
    if not isinstance(view, Slab):
        raise ValueError(f"no part along axis {axis} is taken out of {view}")
    stored, last = view.dropped + axis, len(view.ranges) - 1
    if view.swapped and stored >= last - 1:
        stored = 2 * last - 1 - stored
    low, _, step = view.ranges[stored]
    return replace(view, ranges=_with(view.ranges, stored, (low + start * step, low + (stop - 1) * step + 1, step)))


def every(view: View, first: int, step: int) -> View:
    """``view[first::step]``, where ``step`` divides the first axis."""
    if isinstance(view, Interleaved) and len(view.parts) == step:
        return view.parts[first]
    if not isinstance(view, Slab) or view.swapped or view.ranges[view.dropped][2] != 1:
        raise ValueError(f"no rows in steps of {step} are taken out of {view}")
    start, stop, _ = view.ranges[view.dropped]
    last = stop - step + first  # the last row of this remainder
    return replace(view, ranges=_with(view.ranges, view.dropped, (start + first, last + 1, step)))


def swap(view: View) -> View:
    """The last two axes exchanged."""
    if isinstance(view, Stacked):
        return stack([swap(piece) for piece in view.parts])
    if isinstance(view, Padded):
        return Padded(swap(view.part), (*view.shape[:-2], view.shape[-1], view.shape[-2]))
    if not isinstance(view, Slab) or len(view.shape) < 2 or view.ranges[view.dropped][2] != 1:
        raise ValueError(f"{view} is not swapped")
    return replace(view, swapped=not view.swapped)


def pad(view: View, shape: Shape) -> View:
    """``view`` in a larger shape; itself where that is its own."""
    return view if view.shape == shape else Padded(view, shape)


def crop(view: View, shape: Shape) -> View:
    """The first corner of ``view``."""
    for axis, size in enumerate(shape):
        view = view if view.shape[axis] == size else part(view, axis, 0, size)
    return view


def stack(views: Sequence[View]) -> View:
    """Equal views on a new first axis; all matrices of one stored tensor in order are that tensor."""
    first = views[0]
    if isinstance(first, Slab) and first.dropped:
        axis = first.dropped - 1
        start = first.ranges[axis][0]
        row = [
            replace(first, ranges=_with(first.ranges, axis, (start + i, start + i + 1, 1))) for i in range(len(views))
        ]
        if list(views) == row:
            return replace(first, ranges=_with(first.ranges, axis, (start, start + len(views), 1)), dropped=axis)
    return Stacked(tuple(views))


def join(views: Sequence[View]) -> View:
    """Views one after the other; neighbours in a stored tensor become one."""
    flat: list[View] = []
    for view in views:
        for piece in view.parts if isinstance(view, Joined) else (view,):
            together = _neighbours(flat[-1], piece) if flat else None
            flat[-1:] = [together] if together else [*flat[-1:], piece]
    return flat[0] if len(flat) == 1 else Joined(tuple(flat))


def beside(views: Sequence[View]) -> View:
    """Columns of matrices one after the other; the columns of one stored matrix in order are that matrix."""
    if len(views) == 1:
        return views[0]
    slabs = tuple(view for view in views if isinstance(view, Slab) and not view.swapped and not view.dropped)
    if len(slabs) != len(views):
        raise ValueError(f"only matrices as they are stored stand beside each other, not {views}")
    first, last = slabs[0], slabs[-1]
    starts = [slab.ranges[1][0] for slab in slabs]
    ends = [slab.ranges[1][1] for slab in slabs]
    alike = all(replace(slab, ranges=_with(slab.ranges, 1, first.ranges[1])) == first for slab in slabs)
    if alike and starts[1:] == ends[:-1]:
        return replace(first, ranges=_with(first.ranges, 1, (starts[0], last.ranges[1][1], 1)))
    return Beside(slabs)


def interleave(views: Sequence[View]) -> View:
    """Rows of equal slabs in turn; the rows of one stored tensor in order are that tensor."""
    slabs = tuple(view for view in views if isinstance(view, Slab) and not view.swapped)
    first = slabs[0] if len(slabs) == len(views) else None
    if first is None:
        raise ValueError(f"only slabs are interleaved, not {views}")
    start, stop, step = first.ranges[first.dropped]
    if step == len(slabs) > 1:
        row = [
            replace(first, ranges=_with(first.ranges, first.dropped, (start + i, stop + i, step))) for i in range(step)
        ]
        if list(slabs) == row:
            return replace(first, ranges=_with(first.ranges, first.dropped, (start, stop + step - 1, 1)))
    return Interleaved(slabs)


def leaves(view: View) -> Iterator[Slab]:
    """Every slab, in order."""
    if isinstance(view, Slab):
        yield view
    else:
        for piece in view.parts:
            yield from leaves(piece)


def describe(view: View) -> str:
    """A few words about where the data comes from."""
    names = list(dict.fromkeys(slab.name for slab in leaves(view)))
    first = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    words = {
        Stacked: "stack of",
        Joined: "rows of",
        Interleaved: "alternating rows of",
        Beside: "columns of",
        Slab: "part of",
        Padded: "padded",
    }
    slabs = list(leaves(view))
    is_plain = isinstance(view, Slab) and not view.dropped and view.ranges[0][2] == 1
    kind = "" if is_plain else f"{words[type(view)]} "
    return f"{kind}{first}{', transposed' if slabs[0].swapped else ''}"


def stream(view: View, source: BlockSource, scratch: list[Array] | None = None) -> Iterator[Array]:
    """The data in C order, in blocks of at most ``BLOCK`` elements, or one row; what is padded, a matrix of one expert,
    in one.

    ``scratch`` is memory that matrices to be turned share.
    """
    scratch = [] if scratch is None else scratch
    if isinstance(view, Interleaved):
        rows, *rest = view.parts[0].shape
        step = max(1, BLOCK // (prod(rest) * len(view.parts)))
        for low in range(0, rows, step):
            box = ((low, min(low + step, rows)), *((0, size) for size in rest))
            turns = np.stack([source.finish(piece.name, _read(piece, source, box)) for piece in view.parts], axis=1)
            yield turns.reshape(-1, *rest)
    elif isinstance(view, Beside):
        rows, columns = view.shape
        step = max(1, BLOCK // columns)
        for low in range(0, rows, step):
            top = (low, min(low + step, rows))
            read = [(piece.name, _read(piece, source, (top, (0, piece.shape[1])))) for piece in view.parts]
            yield np.concatenate([source.finish(name, block) for name, block in read], axis=1)
    elif isinstance(view, Padded):
        held = np.concatenate([block.reshape(-1).copy() for block in stream(view.part, source, scratch)])
        filled = np.zeros(view.shape, held.dtype)
        filled[tuple(slice(size) for size in view.part.shape)] = held.reshape(view.part.shape)
        yield filled
    elif not isinstance(view, Slab):
        for piece in view.parts:
            yield from stream(piece, source, scratch)
    elif view.swapped:
        yield from _transposed(view, source, scratch)
    else:
        for box in boxes(view.shape, BLOCK):
            yield source.finish(view.name, _read(view, source, box))


def boxes(shape: Shape, limit: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """(start, stop) per axis of consecutive boxes in C order, each of at most ``limit`` elements, or one row."""
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    if len(shape) > 1 and row > limit:
        for place in range(shape[0]):
            for box in boxes(shape[1:], limit):
                yield ((place, place + 1), *box)
        return
    step = max(1, limit // max(row, 1))
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *((0, size) for size in shape[1:]))


def _with(ranges: tuple[Range, ...], axis: int, new: Range) -> tuple[Range, ...]:
    return (*ranges[:axis], new, *ranges[axis + 1 :])


def _neighbours(left: View, right: View) -> Slab | None:
    """Both in one, when ``right`` starts in the stored tensor where ``left`` ends."""
    if not isinstance(left, Slab) or not isinstance(right, Slab) or left.swapped:
        return None
    axis = left.dropped
    start, middle, step = left.ranges[axis]
    low, stop, other = right.ranges[axis]
    if (step, other, low) != (1, 1, middle):
        return None
    if left != replace(right, ranges=_with(right.ranges, axis, (start, middle, 1))):
        return None
    return replace(left, ranges=_with(left.ranges, axis, (start, stop, 1)))


def _read(view: Slab, source: BlockSource, box: Sequence[tuple[int, int]]) -> Array:
    """The part ``box`` of a slab that is not swapped, in its stored type."""
    index: list[int | slice] = [start for start, _, _ in view.ranges[: view.dropped]]
    kept = view.ranges[view.dropped :]
    for (start, _, step), (low, high) in zip(kept, box, strict=True):
        index.append(slice(start + low * step, start + (high - 1) * step + 1))
    array = source.read(view.name, tuple(index))
    return array[:: kept[0][2]] if kept and kept[0][2] != 1 else array


def _transposed(view: Slab, source: BlockSource, scratch: list[Array]) -> Iterator[Array]:
    """A swapped slab, strip by strip of the stored columns."""
    for piece in _strips(replace(view, swapped=False)):
        strip = _filled(piece, source, scratch)
        step = max(1, BLOCK // strip.shape[1])
        for low in range(0, len(strip), step):
            held = strip[low : low + step]
            block = source.finish(view.name, held)
            yield block.copy() if block is held else block  # the strip is filled again while this one is in use


def _strips(view: Slab) -> Iterator[Slab]:
    """The matrices of a slab that is not swapped, as many columns at a time as ``STRIP`` allows."""
    if len(view.shape) > 2:
        for place in range(view.shape[0]):
            yield from _strips(cast(Slab, matrix(view, place)))
        return
    rows, columns = view.shape
    width = max(1, STRIP // rows)
    for left in range(0, columns, width):
        yield cast(Slab, part(view, 1, left, min(left + width, columns)))


def _filled(view: Slab, source: BlockSource, scratch: list[Array]) -> Array:
    """The transpose of a matrix, in ``scratch``, from bands of its rows."""
    rows, columns = view.shape
    band = max(ROWS, BLOCK // columns // ROWS * ROWS)

    def read(top: int) -> Array:
        return _read(view, source, ((top, min(top + band, rows)), (0, columns)))

    first = read(0)
    strip = shaped(scratch, (columns, rows), first.dtype)
    transpose_bands(strip, band, lambda top: read(top) if top else first)
    return strip
