# SPDX-License-Identifier: Apache-2.0
"""A model seen through a LoRA adapter: each part of a tensor has its part of the product added when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.dtypes import cast
from mindformers_ext.formats.tensors import Array, Index, Reader, TensorInfo
from mindformers_ext.jobs.merge.adapters import Adapter, Product


class AdaptedReader:
    """A ``Reader`` of the model with the adapter merged into it, in float32 and rounded once."""

    def __init__(self, reader: Reader, adapter: Adapter, dtype: np.dtype[Any] | None) -> None:
        """``dtype``: the type of what the adapter touches; None keeps the model's."""
        self._reader, self._adapter = reader, adapter
        infos = dict(reader.infos)
        for name, stored in adapter.whole.items():
            shape = adapter.reader.infos[stored].shape
            kind = infos[name].dtype if name in infos else adapter.reader.infos[stored].dtype
            infos[name] = TensorInfo(name, shape, dtype or kind)
        for name in adapter.products:
            infos[name] = replace(infos[name], dtype=dtype or infos[name].dtype)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        whole, product = self._adapter.whole.get(name), self._adapter.products.get(name)
        array = self._adapter.reader.read(whole, index) if whole else self._reader.read(name, index)
        if product is not None:
            array = array.astype(np.float32) + self._part(product, index).reshape(array.shape)
        if product is None and whole is None:
            return array
        array, lost = cast(array, self.infos[name].dtype)
        if lost:
            raise UserError(
                f"'{name}' with its adapter: {lost} values are beyond the range of {array.dtype}: pass "
                "--lora-merge-dtype float32"
            )
        return array

    def close(self) -> None:
        """Close the files of both."""
        self._reader.close()
        self._adapter.reader.close()

    def _part(self, product: Product, index: Index) -> Array:
        """Rows and columns of the product that ``index`` selects, float32; whole axes of an int keep a length of 1."""
        rows, columns = (_range(item) for item in (*index, slice(None), slice(None))[:2])
        read = self._adapter.reader.read
        if product.turned:
            left, right = read(product.left, (slice(None), rows)).T, read(product.right, (columns,)).T
        else:
            left, right = read(product.left, (rows,)), read(product.right, (slice(None), columns))
        return np.float32(product.scale) * (left.astype(np.float32) @ right.astype(np.float32))


def _range(item: int | slice) -> slice:
    return slice(item, item + 1) if isinstance(item, int) else item
