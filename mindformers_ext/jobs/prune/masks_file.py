# SPDX-License-Identifier: Apache-2.0
"""``masks.npz``: the masks of a pruning run, what size they were expected to have, and between which shapes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import MODULES, ModelShape
from mindformers_ext.formats.atomic import fresh_file

MASKS = "masks.npz"
MOST_BYTES = 2**28  # of the file unpacked; 80 layers of 28,672 intermediate units are 18 MB
SHAPE_FIELDS = tuple(ModelShape.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class SavedMasks:
    """``values`` by module, as evaluation takes them; ``expected``: the sparsity that each row was expected to have."""

    values: Mapping[str, np.ndarray]
    source: ModelShape
    target: ModelShape | None = None
    expected: Mapping[str, np.ndarray] | None = None

    def gaps(self) -> dict[str, float]:
        """By module the largest distance of a layer's expected sparsity from the target; empty without a target."""
        if self.target is None or self.expected is None:
            return {}
        wanted = {name: 1.0 - self.target.units(name) / self.source.units(name) for name in self.expected}
        return {name: float(np.abs(found - wanted[name]).max()) for name, found in self.expected.items()}


def write_masks(path: Path, masks: SavedMasks, overwrite: bool = False) -> None:
    """Write the file whole; the same masks give the same bytes."""
    arrays: dict[str, Any] = {f"{name}_z": np.asarray(value, np.float32) for name, value in masks.values.items()}
    arrays |= {f"{name}_expected": np.asarray(value, np.float64) for name, value in (masks.expected or {}).items()}
    arrays["source"] = sizes_of(masks.source)
    if masks.target:
        arrays["target"] = sizes_of(masks.target)
    with fresh_file(path, overwrite) as partial, partial.open("wb") as file:
        np.savez(file, **{name: arrays[name] for name in sorted(arrays)})


def sizes_of(shape: ModelShape) -> np.ndarray:
    """A shape as an array, in the order of ``SHAPE_FIELDS``."""
    return np.array([getattr(shape, name) for name in SHAPE_FIELDS], np.int64)


def read_masks(path: Path) -> SavedMasks:
    """The masks in ``path``; ``UserError`` where it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(item.file_size for item in archive.infolist()) > MOST_BYTES:
                raise UserError(f"'{path}' unpacks to more than {MOST_BYTES} bytes: these are no model's masks")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' holds no masks ({error}): write it with 'prune.py masks'") from error
    shapes = {name: read_shape(found.pop(name), path) for name in ("source", "target") if name in found}
    if "source" not in shapes:
        raise UserError(f"'{path}' does not say of which model its masks are: write it with 'prune.py masks'")
    values: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for name, array in found.items():
        module, _, kind = name.rpartition("_")
        if module not in MODULES or kind not in ("z", "expected") or array.dtype.kind != "f":
            raise UserError(f"'{path}' holds '{name[:80]}', which is no mask: write it with 'prune.py masks'")
        (values if kind == "z" else expected)[module] = array
    if set(expected) != set(values) and expected:
        raise UserError(f"'{path}' has not the expected size of every mask: write it again with 'prune.py masks'")
    return SavedMasks(values, shapes["source"], shapes.get("target"), expected or None)


def read_shape(array: np.ndarray, path: Path) -> ModelShape:
    """What ``sizes_of`` has written into ``path``; ``UserError`` where it is none."""
    if array.shape != (len(SHAPE_FIELDS),) or array.dtype != np.int64 or not np.all((array > 0) & (array < 2**31)):
        raise UserError(f"'{path}': the sizes of its model are not {len(SHAPE_FIELDS)} numbers above 0")
    return ModelShape(**dict(zip(SHAPE_FIELDS, map(int, array), strict=True)))


def differences(one: ModelShape, other: ModelShape) -> Iterator[tuple[str, int, int]]:
    """Names and both values of the sizes in which two shapes differ."""
    for name in SHAPE_FIELDS:
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            yield name, ours, theirs
