# SPDX-License-Identifier: Apache-2.0
"""How the tensors of one rule turn into each other. Elements move, none is computed: inverses are exact.

A transform joins n Hugging Face tensors and m MindSpore tensors, as views: no data is touched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from mindformers_ext.weights.views import Shape, View, beside, every, interleave, join, matrix, part, stack, swap

Views = tuple[View, ...]


class Transform(Protocol):
    """n tensors on the Hugging Face side, m on the MindSpore side, elements the same."""

    def to_ms(self, hf: Sequence[View]) -> Views:
        """The MindSpore tensors of the Hugging Face tensors."""

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """The Hugging Face tensors, of ``hf_shapes``, of the MindSpore tensors."""


@dataclass(frozen=True)
class Identity:
    """One tensor, unchanged."""

    def to_ms(self, hf: Sequence[View]) -> Views:
        """The tensor itself."""
        return (hf[0],)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """The tensor itself."""
        return (ms[0],)


@dataclass(frozen=True)
class Stack:
    """n equal matrices, one per expert, on a new first axis: n x (A, B) <-> (n, A, B)."""

    def to_ms(self, hf: Sequence[View]) -> Views:
        """The stack, in the rule's (numeric) order."""
        return (stack(hf),)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """The matrices of the stack."""
        return tuple(matrix(ms[0], place) for place in range(len(hf_shapes)))


@dataclass(frozen=True)
class Concatenated:
    """Matrices one after the other along ``axis``, rows (0) or columns (1): (A, B1), (A, B2) <-> (A, B1 + B2)."""

    axis: int = 0

    def to_ms(self, hf: Sequence[View]) -> Views:
        """All in one, in the rule's (numeric) order."""
        return (join(hf) if self.axis == 0 else beside(hf),)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """Apart again."""
        ends = list(accumulate(shape[self.axis] for shape in hf_shapes))
        starts = [0, *ends[:-1]]
        return tuple(part(ms[0], self.axis, start, end) for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class SplitHalves:
    """Gate above up in one tensor, and the two apart: (E, 2F, D) <-> (E, F, D), (E, F, D)."""

    def to_ms(self, hf: Sequence[View]) -> Views:
        """The upper and the lower half of every expert."""
        half = hf[0].shape[1] // 2
        return part(hf[0], 1, 0, half), part(hf[0], 1, half, 2 * half)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """Both halves in one tensor again."""
        return (stack([join([matrix(half, place) for half in ms]) for place in range(hf_shapes[0][0])]),)


@dataclass(frozen=True)
class GroupedQkv:
    """q, k and v in one tensor, group after group: [n_rep*P rows of q | P of k | P of v] for each of N kv heads.

    (H*P, D), (N*P, D), (N*P, D) <-> ((H + 2N)*P, D). ``groups`` is N.
    """

    groups: int

    def to_ms(self, hf: Sequence[View]) -> Views:
        """w_qkv."""
        return (join([_rows(view, self.groups, group) for group in range(self.groups) for view in hf]),)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """q, k, v."""
        heights = [shape[0] // self.groups for shape in hf_shapes]
        starts = [sum(heights[:place]) for place in range(len(heights))]
        group_rows = sum(heights)
        return tuple(
            join(
                [
                    part(ms[0], 0, group * group_rows + start, group * group_rows + start + height)
                    for group in range(self.groups)
                ]
            )
            for start, height in zip(starts, heights, strict=True)
        )


@dataclass(frozen=True)
class InterleavedRows:
    """Gate and up of a dense feed-forward, rows in turn: (F, D), (F, D) <-> (2F, D)."""

    def to_ms(self, hf: Sequence[View]) -> Views:
        """gate 0, up 0, gate 1, up 1, ..."""
        return (interleave(hf),)

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """The even and the odd rows."""
        return every(ms[0], 0, 2), every(ms[0], 1, 2)


@dataclass(frozen=True)
class Transposed:
    """Another transform whose MindSpore tensors have their last two axes swapped: (E, F, D) <-> (E, D, F)."""

    inner: Transform

    def to_ms(self, hf: Sequence[View]) -> Views:
        """The inner tensors, swapped."""
        return tuple(swap(view) for view in self.inner.to_ms(hf))

    def to_hf(self, ms: Sequence[View], hf_shapes: Sequence[Shape]) -> Views:
        """The inner inverse of the swapped tensors."""
        return self.inner.to_hf([swap(view) for view in ms], hf_shapes)


def _rows(view: View, groups: int, group: int) -> View:
    height = view.shape[0] // groups
    return part(view, 0, group * height, (group + 1) * height)
