# SPDX-License-Identifier: Apache-2.0
"""How the tensors of one rule turn into each other. Elements move, none is computed: inverses are exact.

A transform joins n Hugging Face tensors and m MindSpore tensors. It makes one tensor at a time from lazy reads, so
that a conversion holds one result and one part of a source in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mindformers_ext.formats.tensors import Array, Index

Shape = tuple[int, ...]
Read = Callable[[int, Index], Array]
"""``read(i, index)``: the part ``index`` of the rule's i-th tensor on the other side."""


class Transform(Protocol):
    """n tensors on the Hugging Face side, m on the MindSpore side, elements the same."""

    def ms_shapes(self, hf_shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """Shapes of the MindSpore tensors."""

    def to_ms(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The ``which``-th MindSpore tensor from reads of the Hugging Face tensors."""

    def to_hf(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The ``which``-th Hugging Face tensor from reads of the MindSpore tensors."""


@dataclass(frozen=True)
class Identity:
    """One tensor, unchanged."""

    def ms_shapes(self, hf_shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """The same shape."""
        return (hf_shapes[0],)

    def to_ms(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The tensor itself."""
        return read(which, ())

    def to_hf(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The tensor itself."""
        return read(which, ())


@dataclass(frozen=True)
class Stack:
    """n equal matrices, one per expert, on a new first axis: n x (A, B) <-> (n, A, B)."""

    def ms_shapes(self, hf_shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """(n, A, B)."""
        return ((len(hf_shapes), *hf_shapes[0]),)

    def to_ms(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The stack, filled matrix by matrix in the rule's (numeric) order."""
        first = read(0, ())
        stacked = np.empty((len(hf_shapes), *first.shape), first.dtype)
        stacked[0] = first
        for place in range(1, len(hf_shapes)):
            stacked[place] = read(place, ())
        return stacked

    def to_hf(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """Matrix ``which`` of the stack."""
        return read(0, (which,))


@dataclass(frozen=True)
class SplitHalves:
    """One fused tensor and its two halves along ``axis``: (E, 2F, D) <-> (E, F, D), (E, F, D) with axis 1."""

    axis: int = 1

    def ms_shapes(self, hf_shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """Twice the shape with ``axis`` halved."""
        shape = list(hf_shapes[0])
        shape[self.axis] //= 2
        return tuple(shape), tuple(shape)

    def to_ms(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The first (``which`` 0) or the second half."""
        half = hf_shapes[0][self.axis] // 2
        part = slice(which * half, (which + 1) * half)
        return read(0, (slice(None),) * self.axis + (part,))

    def to_hf(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """Both halves in one tensor again."""
        half = hf_shapes[0][self.axis] // 2
        first = read(0, ())
        fused = np.empty(hf_shapes[0], first.dtype)
        before = (slice(None),) * self.axis
        front, back = (*before, slice(0, half)), (*before, slice(half, 2 * half))
        fused[front] = first
        del first
        fused[back] = read(1, ())
        return fused


@dataclass(frozen=True)
class Transposed:
    """Another transform whose MindSpore tensors have their last two axes swapped: (E, F, D) <-> (E, D, F)."""

    inner: Transform

    def ms_shapes(self, hf_shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """The inner shapes, last two axes swapped."""
        return tuple((*shape[:-2], shape[-1], shape[-2]) for shape in self.inner.ms_shapes(hf_shapes))

    def to_ms(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The inner result, swapped."""
        return _swap(self.inner.to_ms(read, which, hf_shapes))

    def to_hf(self, read: Read, which: int, hf_shapes: Sequence[Shape]) -> Array:
        """The inner inverse over swapped reads (inner transforms select whole matrices of a stored stack)."""
        return np.ascontiguousarray(self.inner.to_hf(lambda i, index: _swap(read(i, index)), which, hf_shapes))


def _swap(array: Array) -> Array:
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))
