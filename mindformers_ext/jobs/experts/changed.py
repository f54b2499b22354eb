# SPDX-License-Identifier: Apache-2.0
"""A model's tensors, some of which come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo


class ChangedReader:
    """The tensors of ``reader`` with those named in ``changes`` made by a call, of the same shape.

    A changed one comes as it is made, not in the stored type: whoever writes it casts it once.
    """

    def __init__(self, reader: Reader, changes: Mapping[str, Callable[[], Array]]) -> None:
        self._reader, self._changes = reader, changes
        self.infos: Mapping[str, TensorInfo] = reader.infos

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        return self._changes[name]()[index] if name in self._changes else self._reader.read(name, index)

    def close(self) -> None:
        """Let go of the files."""
        self._reader.close()
