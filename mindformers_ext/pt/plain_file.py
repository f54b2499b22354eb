# SPDX-License-Identifier: Apache-2.0
"""Small files of torch.save that hold numbers only: a list of ints, lists of ints, one tensor, or tensors by name.

They are written so that torch.load reads them by its default (``weights_only``). No code of a file is ever run, not
even of an older one that holds numpy's numbers: of its names only those of numpy's plain arrays are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.pickle_table import NAMES
from mindformers_ext.pt.torch_file import FAULTS, check_storages, check_zip, checked_tensor, fault_text

Plain = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Mapping[str, np.ndarray]
NUMPY_NAMES = re.compile(
    NAMES.pattern + r"|numpy\.(_?core)\.multiarray (scalar|_reconstruct)|numpy (dtype|ndarray)|_codecs encode"
)
_KINDS = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")


def write_plain(path: Path, value: Plain) -> None:
    """Write ``value`` to ``path``. Arrays become tensors, lists stay lists of Python's ints; the same value gives the
    same bytes."""
    with path.open("wb") as file:  # an open file: torch would put the path's name into the archive
        torch.save(_for_torch(value), file)


def read_plain(path: Path, allow_pickle: bool = False) -> Any:
    """What ``write_plain`` wrote: ints and lists as they are, tensors as numpy arrays (bfloat16 as float32).

    ``allow_pickle`` also reads numpy's numbers and arrays, as the reference's older files hold them; numbers come as
    Python's.

    Raises:
        UserError: not such a file, damaged, or holding anything else.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist or is no file: check the path")
    try:
        stored = check_zip(path, NUMPY_NAMES if allow_pickle else NAMES)
    except UserError as error:
        if not allow_pickle and "numpy" in str(error):
            raise UserError(
                f"'{path}' holds numpy's numbers, as older tools wrote them: pass --allow_pickle to read it "
                "(nothing of it is run), or split the layer again"
            ) from error
        raise
    try:
        with torch.serialization.safe_globals(_numpy_globals() if allow_pickle else []):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FAULTS as error:
        raise UserError(f"'{path}' cannot be read as plain numbers ({fault_text(error)}): write it again") from error
    tensors: list[torch.Tensor] = []
    value = _from_torch(loaded, path, tensors)
    check_storages(path, tensors, stored)
    return value


def _for_torch(value: object) -> object:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C", copy=True))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _for_torch(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_for_torch(item) for item in value]
    if isinstance(value, int | float):
        return value
    raise TypeError(f"a plain file holds numbers, lists of them and arrays, not {type(value).__name__}")


def _from_torch(value: object, path: Path, tensors: list[torch.Tensor], depth: int = 0) -> Any:
    """Python's numbers, lists and numpy arrays of what torch has loaded; each tensor is added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensor = checked_tensor(path, "its tensor", value)
        tensors.append(tensor)
        return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C", copy=True)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple) and depth < 2:
        return [_from_torch(item, path, tensors, depth + 1) for item in value]
    if isinstance(value, dict) and depth == 0 and all(isinstance(name, str) for name in value):
        return {name: _from_torch(item, path, tensors, depth + 1) for name, item in value.items()}
    raise UserError(f"'{path}' holds a {type(value).__name__}, not plain numbers: write it again")


def _numpy_globals() -> list[Any]:
    """What numpy's plain arrays and numbers are built by, under the names of numpy 1 and 2."""
    from _codecs import encode

    from numpy.core import multiarray

    both = [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
    found: list[Any] = [(getattr(multiarray, name), f"{module}.{name}") for module, name in both]
    return [*found, np.dtype, np.ndarray, (encode, "_codecs.encode"), *(type(np.dtype(kind)) for kind in _KINDS)]
