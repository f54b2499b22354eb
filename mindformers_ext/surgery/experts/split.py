# SPDX-License-Identifier: Apache-2.0
"""Which neurons of one feed-forward part make up which expert. Neuron i is row i of gate and up, column i of down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.errors import UserError


@dataclass(frozen=True, eq=False)
class LayerSplit:
    """The experts of one layer as lists of neuron ids.

    width: neurons of the dense part, the intermediate size. experts: int64 ids per routed expert, in the order in which
    the expert holds them. residual: ids per expert that every token passes. A neuron may stand in several experts, or
    in none; within one expert it stands once.
    """

    width: int
    experts: tuple[np.ndarray, ...]
    residual: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        for name in ("experts", "residual"):
            lists = tuple(np.asarray(item, np.int64).reshape(-1) for item in getattr(self, name))
            object.__setattr__(self, name, lists)
        if not self.experts:
            raise UserError("a split has no experts: give at least one")
        for place, ids in enumerate((*self.experts, *self.residual)):
            what = f"expert {place}" if place < len(self.experts) else f"residual expert {place - len(self.experts)}"
            if not ids.size:
                raise UserError(f"{what} is empty: every expert needs at least one neuron")
            if ids.min() < 0 or ids.max() >= self.width:
                raise UserError(
                    f"{what} names neuron {ids.min() if ids.min() < 0 else ids.max()}, the layer has "
                    f"{self.width} (0 to {self.width - 1}): the split belongs to another model"
                )
            if np.unique(ids).size != ids.size:
                raise UserError(f"{what} names a neuron twice: split the layer again")

    @classmethod
    def from_labels(cls, labels: Sequence[int] | np.ndarray, experts: int) -> LayerSplit:
        """The split in which neuron i belongs to expert ``labels[i]``; ids rise within an expert.

        Raises:
            UserError: a label outside 0 .. ``experts`` - 1, or an expert without neurons.
        """
        array = np.asarray(labels)
        if array.ndim != 1 or array.dtype.kind not in "iu" and not np.array_equal(array, np.floor(array)):
            raise UserError(f"labels are whole numbers in one row, found {array.dtype} of shape {array.shape}")
        array = array.astype(np.int64)
        if array.size and (array.min() < 0 or array.max() >= experts):
            wrong = array.min() if array.min() < 0 else array.max()
            raise UserError(
                f"neuron {int(np.argmax(array == wrong))} has expert {wrong}, allowed are 0 to "
                f"{experts - 1}: give the --num_experts of the split"
            )
        order = np.argsort(array, kind="stable")
        counts = np.bincount(array, minlength=experts)
        return cls(array.size, tuple(np.split(order, np.cumsum(counts)[:-1])))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Neurons per routed expert."""
        return tuple(ids.size for ids in self.experts)

    @property
    def residual_sizes(self) -> tuple[int, ...]:
        """Neurons per residual expert."""
        return tuple(ids.size for ids in self.residual)

    @property
    def is_partition(self) -> bool:
        """Whether every neuron stands in exactly one expert, the residual ones included."""
        every = np.concatenate((*self.experts, *self.residual))
        return every.size == self.width and np.unique(every).size == self.width

    def labels(self) -> np.ndarray:
        """The routed expert of each neuron, int64 of shape (width,).

        Raises:
            UserError: a neuron stands in several experts or in none, or there are residual experts.
        """
        if self.residual or not self.is_partition:
            raise UserError(
                "this split has no label per neuron: neurons are shared, left out or in residual experts; "
                "use its lists of neurons"
            )
        labels = np.empty(self.width, np.int64)
        for expert, ids in enumerate(self.experts):
            labels[ids] = expert
        return labels

    def mask(self) -> np.ndarray:
        """bool (width, experts): whether a routed expert holds a neuron."""
        mask = np.zeros((self.width, len(self.experts)), bool)
        for expert, ids in enumerate(self.experts):
            mask[ids, expert] = True
        return mask

    def passed(self) -> np.ndarray:
        """float32 (width,): in how many residual experts a neuron stands, which every token passes."""
        count = np.zeros(self.width, np.float32)
        for ids in self.residual:
            count[ids] += 1
        return count


def expert_size(width: int, experts: int) -> int:
    """Neurons of each of ``experts`` equal experts.

    Raises:
        UserError: ``width`` is no multiple of it, or there are fewer neurons than experts, or fewer than one expert.
    """
    if experts < 1 or experts > width or width % experts:
        near = [count for count in range(1, min(width, 4 * max(experts, 4)) + 1) if width % count == 0]
        raise UserError(
            f"{width} neurons cannot be cut into {experts} experts of one size: choose a divisor of {width}, such as "
            f"{', '.join(map(str, near[-4:]))}"
        )
    return width // experts
