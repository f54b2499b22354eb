# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save that hold dictionaries of numbers in dictionaries: LLaMA-MoE v2's gates, scores and indices.

They are written so that torch.load reads them by its default (``weights_only``); no code of a file is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.torch_file import FAULTS, check_storages, check_zip, checked_tensor, fault_text

DEPTH = 4  # dictionaries and lists in each other
MOST_NUMBERS = 2**23  # of all lists together: 126 layers of 53,248 neurons


def write_tables(path: Path, value: Mapping[Any, Any]) -> None:
    """Write ``value``: dictionaries whose keys are names or whole numbers, in them arrays, lists of ints, or more of
    them. The same value gives the same bytes."""
    with path.open("wb") as file:  # an open file: torch would put the path's name into the archive
        torch.save(_for_torch(value), file)


def read_tables(path: Path) -> Any:
    """What ``write_tables`` wrote, or another program: tensors as numpy arrays (bfloat16 as float32).

    Raises:
        UserError: not such a file, damaged, or holding anything else.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist or is no file: check the path")
    stored = check_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FAULTS as error:
        raise UserError(f"'{path}' cannot be read as plain numbers ({fault_text(error)}): write it again") from error
    reader = _Reader(path)
    value = reader.plain(loaded, 0)
    check_storages(path, reader.tensors, stored)
    return value


def _for_torch(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C", copy=True))
    if isinstance(value, Mapping):
        return {key: _for_torch(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_torch(item) for item in value]
    if isinstance(value, str | int | float):
        return value
    raise TypeError(f"a table holds numbers, texts, lists of them and arrays, not {type(value).__name__}")


class _Reader:
    """Plain values of what was loaded, and the tensors among it."""

    def __init__(self, path: Path) -> None:
        self.path, self.tensors, self.left = path, list[torch.Tensor](), MOST_NUMBERS

    def plain(self, value: Any, depth: int) -> Any:
        """One value; ``depth``: how many it stands in."""
        if isinstance(value, torch.Tensor):
            tensor = checked_tensor(self.path, "a tensor", value)
            self.tensors.append(tensor)
            return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), copy=True)
        if isinstance(value, bool | int | float | str):
            return value
        if depth < DEPTH and isinstance(value, dict | list | tuple):
            self.left -= len(value)
            if self.left < 0:
                raise UserError(f"'{self.path}' holds more than {MOST_NUMBERS} numbers in lists: it is no such file")
            if not isinstance(value, dict):
                return [self.plain(item, depth + 1) for item in value]
            if all(isinstance(key, int | str) for key in value):
                return {key: self.plain(item, depth + 1) for key, item in value.items()}
        raise UserError(f"'{self.path}' holds a {type(value).__name__}, not plain numbers: write it again")
