# SPDX-License-Identifier: Apache-2.0
"""What every tensor file looks like from above: names, shapes and types known at once, data read on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MOST_TENSORS = 2**17  # of one file; the largest models known have 91,000 in all their files
Index = tuple[int | slice, ...]
"""Selects along the leading axes, as in numpy; ``()`` is the whole tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and type of a tensor, without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


class TensorReader(Protocol):
    """A source of named tensors. ``infos`` costs no data; ``read`` returns an array the caller owns."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor ``name``, or the part of it that ``index`` selects."""


class TensorWriter(Protocol):
    """A sink that takes tensors one at a time."""

    def add(self, name: str, array: Array) -> None:
        """Append one tensor."""

    def add_parts(self, info: TensorInfo, parts: Iterable[Array]) -> None:
        """Append one tensor that comes in consecutive parts, C order."""


def as_array(value: object) -> Array:
    """A numpy array of anything that holds one: numpy, a torch tensor (bfloat16 included) or a MindSpore tensor."""
    if hasattr(value, "asnumpy"):
        array = np.asarray(value.asnumpy())
        foreign = array.dtype.name == "bfloat16" and array.dtype != ml_dtypes.bfloat16
        return array.view(np.uint16).view(ml_dtypes.bfloat16) if foreign else array  # MindSpore registers its own type
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy() refuses it; the way through float32 is exact
            return np.asarray(tensor.float().numpy()).astype(ml_dtypes.bfloat16)
        return np.asarray(tensor.numpy())
    return np.asarray(value)


class Reader(TensorReader, Protocol):
    """A reader that is closed after use."""

    def close(self) -> None:
        """Let go of the files."""


class MappingReader:
    """A ``TensorReader`` over arrays in memory. Reading copies, so results never alias the source."""

    def __init__(self, tensors: Mapping[str, object]) -> None:
        """``tensors``: anything ``as_array`` accepts, by name."""
        self._arrays = {name: as_array(value) for name, value in tensors.items()}
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, array.shape, array.dtype) for name, array in self._arrays.items()
        }

    def read(self, name: str, index: Index = ()) -> Array:
        """A copy of the tensor, or of the part that ``index`` selects."""
        return np.array(self._arrays[name][index], order="C", copy=True)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._arrays)
