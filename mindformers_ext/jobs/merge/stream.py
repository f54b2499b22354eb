# SPDX-License-Identifier: Apache-2.0
"""Runs the tasks of a merge: chunks of rows from the files to a method and from there to the file written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.dtypes import BFLOAT16, BY_NUMPY, cast
from mindformers_ext.formats.tensors import Array, Index, TensorReader
from mindformers_ext.jobs.merge.plan import MergePart, TensorTask
from mindformers_ext.surgery.merge.settings import Method

if TYPE_CHECKING:
    from mindformers_ext.surgery.merge.stream import Chunk, Stream

CHUNK = 3 * 2**17  # elements of one chunk: a handful of float32 copies of it stay in the processor's cache
COPIED = 2**19  # elements of a block that is only copied: looked at and written while the cache holds it


@dataclass
class Findings:
    """What came up while data was read and made: tensors with NaN or infinite values, and values that overflowed.

    ``allow_overflow``: what does not fit its type is counted, not refused.
    """

    strict: bool = False
    allow_overflow: bool = False
    broken: dict[str, None] = field(default_factory=dict)
    overflown: dict[str, int] = field(default_factory=dict)

    def look(self, array: Array, part: MergePart) -> None:
        """Note a NaN or an infinite value; with ``strict`` a ``UserError``."""
        if finite(array):
            return
        where = f"'{part.name}' of '{part.model}'"
        if self.strict:
            raise UserError(f"{where} holds NaN or infinite values: mend that model (--strict refuses it)")
        self.broken[where] = None

    def is_broken(self, parts: Iterable[MergePart]) -> bool:
        """Whether one of ``parts`` held NaN or infinite values when it was read."""
        return any(f"'{part.name}' of '{part.model}'" in self.broken for part in parts)

    def overflow(self, name: str, lost: int, kind: str) -> None:
        """Count ``lost`` values of the output ``name`` that are too large for type ``kind``; refuse where not allowed.

        Raises:
            UserError: there are some, and overflow is not allowed.
        """
        if not lost:
            return
        if not self.allow_overflow:
            raise UserError(
                f"'{name}': {lost} or more values are beyond the range of {kind}: choose dtype (and out_dtype) "
                "bfloat16 or float32, or pass --allow-overflow to write them as infinite or NaN"
            )
        self.overflown[name] = self.overflown.get(name, 0) + lost

    def notes(self) -> list[str]:
        """What the run should say."""
        result = []
        if self.broken:
            names = list(self.broken)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            result.append(f"warning: {names[0]}{more} held NaN or infinite values, and so does the merge")
        if self.overflown:
            worst = next(iter(self.overflown))
            result.append(
                f"warning: {sum(self.overflown.values())} values became infinite or NaN in {len(self.overflown)} "
                f"tensors, first '{worst}': choose dtype bfloat16 or float32"
            )
        return result


def finite(array: Array) -> bool:
    """Whether a float array holds neither NaN nor infinity, by its bits: much faster than ``isfinite``."""
    if not array.size:
        return True
    kind = np.dtype(f"u{array.dtype.itemsize}")
    bits = array.reshape(-1).view(kind)
    infinite = int(np.array(np.inf, array.dtype).view(kind))
    sign = 1 << (array.dtype.itemsize * 8 - 1)
    # the positive are the largest of the signed, the negative (highest bit set) the largest of the unsigned
    signed = bits.view(np.dtype(f"i{array.dtype.itemsize}"))
    return int(signed.max()) < infinite and int(bits.max()) < infinite + sign


def unbounded(array: Array) -> int:
    """How many elements are NaN or infinite."""
    return 0 if finite(array) else int(np.count_nonzero(~np.isfinite(array)))


def row_blocks(shape: tuple[int, ...], elements: int) -> Iterator[tuple[Index, int]]:
    """Indices that select consecutive rows of a tensor, about ``elements`` at a time, and where each begins, flattened.

    A vector is one block, because methods treat it as one row.
    """
    if len(shape) < 2:
        yield (), 0
    elif len(shape) > 2:
        inner = prod(shape[1:])
        for item in range(shape[0]):
            for index, start in row_blocks(shape[1:], elements):
                yield (item, *index), item * inner + start
    else:
        step = max(1, elements // max(1, shape[1]))
        for at in range(0, shape[0], step):
            yield (slice(at, min(at + step, shape[0])),), at * shape[1]


class TaskRunner:
    """Makes the data of tasks, a block at a time."""

    def __init__(self, method: Method, readers: Mapping[str, TensorReader], device: str, findings: Findings) -> None:
        """``readers`` by the name of the model."""
        self._method, self._readers, self._device, self._findings = method, readers, device, findings

    def blocks(self, task: TensorTask) -> Iterator[Array]:
        """The task's output in consecutive blocks of its own type."""
        return self._copy(task) if task.copied else self._merge(task)

    def _copy(self, task: TensorTask) -> Iterator[Array]:
        part = task.inputs[0]
        for index, _ in row_blocks(task.info.shape, COPIED):
            array = self._readers[part.model].read(part.name, index)
            self._findings.look(array, part)
            array, lost = cast(array, np.dtype(BY_LONG[task.math]))
            self._findings.overflow(task.info.name, lost, task.math)
            array, lost = cast(array, task.info.dtype)
            self._findings.overflow(task.info.name, lost, BY_NUMPY[task.info.dtype].long)
            yield array

    def _merge(self, task: TensorTask) -> Iterator[Array]:
        from mindformers_ext.surgery.merge.bridge import array_of

        target, parts = BY_NUMPY[task.info.dtype].long, parts_of(task)
        for tensor in self._method.run(self.stream(task, counted=True), task.settings):
            array = array_of(tensor, target)
            array = array.view(BFLOAT16) if target == "bfloat16" else array
            lost = unbounded(array)
            if lost and not self._findings.is_broken(parts):
                self._findings.overflow(task.info.name, lost, max(target, task.math, key=LARGEST.index))
            yield array

    def stream(self, task: TensorTask, counted: bool = False) -> Stream:
        """The task's inputs in chunks, on the device. ``counted``: too large for the arithmetic is an overflow."""
        from mindformers_ext.surgery.merge.bridge import tensor_of
        from mindformers_ext.surgery.merge.stream import Chunk, Stream, in_rows

        parts = parts_of(task)
        looked = -1  # the last chunk whose values were looked at; walks may end early and begin again
        judged = counted and not self._findings.allow_overflow

        def chunks() -> Iterator[Chunk]:
            nonlocal looked
            for index, start in row_blocks(task.info.shape, CHUNK):
                look, looked = start > looked, max(start, looked)
                tensors = []
                for part in parts:
                    reader = self._readers[part.model]
                    array = reader.read(part.name, index)
                    if not index and array.shape != task.info.shape:
                        array = array[: task.info.shape[0]]
                    if look:
                        self._findings.look(array, part)
                    kind = BY_NUMPY[reader.infos[part.name].dtype].long
                    if look and judged and narrower(task.math, kind):
                        self._findings.overflow(task.info.name, cast(array, BY_LONG[task.math])[1], task.math)
                    tensors.append(in_rows(tensor_of(array, kind, task.math, self._device)))
                base = tensors.pop(0) if task.base else None
                yield Chunk(start, base, tuple(tensors))

        rows = prod(task.info.shape[:-1]) if len(task.info.shape) > 1 else 1
        columns = task.info.shape[-1] if task.info.shape else 1
        return Stream(task.info.name, (rows, columns), len(task.inputs), chunks)


def parts_of(task: TensorTask) -> list[MergePart]:
    """Every tensor that the task reads, the base's first."""
    return [*([task.base] if task.base else []), *task.inputs]


def narrower(kind: str, than: str) -> bool:
    """Whether type ``kind`` ends before ``than`` does."""
    return LARGEST.index(kind) > LARGEST.index(than)


LARGEST = ("float64", "float32", "bfloat16", "float16")  # by falling range
BY_LONG = {row.long: dtype for dtype, row in BY_NUMPY.items()}
