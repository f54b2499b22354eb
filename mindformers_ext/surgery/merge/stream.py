# SPDX-License-Identifier: Apache-2.0
"""How a method sees a tensor of several models: as chunks of rows that can be walked through again and again.

A method that needs a number of the whole tensor (a norm, a threshold) walks once to find it and once to apply it, so
memory stays at a few chunks whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunk:
    """The same rows of every model, all in the merge's type, shape (rows, columns).

    ``start`` is the index of the first element in the flattened tensor. ``base`` is None where the method has none.
    """

    start: int
    base: torch.Tensor | None
    inputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Stream:
    """One tensor of all models. Every call of ``chunks`` begins anew; the chunks come in order and cover everything.

    ``shape`` is (rows, columns): a vector is one row, further leading axes are folded into the rows.
    """

    name: str
    shape: tuple[int, int]
    inputs: int
    chunks: Callable[[], Iterator[Chunk]]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape[0] * self.shape[1]


def in_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as (rows, columns), not copied where it is contiguous."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def stream_of(
    name: str, base: torch.Tensor | None, inputs: tuple[torch.Tensor, ...], rows: int | None = None
) -> Stream:
    """A stream over tensors in memory (all of one shape), ``rows`` rows at a time (None: all at once)."""
    flat = [in_rows(tensor) for tensor in inputs]
    flat_base = None if base is None else in_rows(base)
    height, width = flat[0].shape

    def chunks() -> Iterator[Chunk]:
        step = rows or max(height, 1)
        for at in range(0, height, step):
            part = None if flat_base is None else flat_base[at : at + step]
            yield Chunk(at * width, part, tuple(tensor[at : at + step] for tensor in flat))

    return Stream(name, (height, width), len(inputs), chunks)


def need_base(chunk: Chunk) -> torch.Tensor:
    """The base's rows; a chunk without them is a mistake of the caller."""
    if chunk.base is None:
        raise ValueError("this method needs a base tensor")
    return chunk.base
