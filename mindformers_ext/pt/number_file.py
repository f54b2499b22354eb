# SPDX-License-Identifier: Apache-2.0
"""Small files of torch.save that hold numbers only: a list of ints, lists of ints, one tensor, or tensors by name.

They are written so that torch.load reads them by its default (``weights_only``). No code of a file is ever run; an
older one with numpy's numbers is read as data (``pt.pickle_values``).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.pickle_table import MAX_TABLE
from mindformers_ext.pt.pickle_values import read_values
from mindformers_ext.pt.torch_file import FAULTS, check_storages, check_zip, checked_tensor, fault_text

Numbers = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Mapping[str, np.ndarray]
PROTOCOL = 2  # torch's own, and the newest that its reader without code knows
MOST_NUMBERS = 2**22  # in lists: one may be named many times in few bytes


def write_numbers(path: Path, value: Numbers) -> None:
    """Write ``value`` to ``path``. Arrays become tensors, lists stay lists of Python's ints; the same value gives the
    same bytes."""
    with path.open("wb") as file:  # an open file: torch would put the path's name into the archive
        torch.save(_for_torch(value), file)


def read_numbers(path: Path, allow_pickle: bool = False) -> Any:
    """What ``write_numbers`` wrote: ints and lists as they are, tensors as numpy arrays (bfloat16 as float32).

    ``allow_pickle`` also reads numpy's numbers and arrays, as the reference's older files hold them; numbers come as
    Python's.

    Raises:
        UserError: not such a file, damaged, or holding anything else.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist or is no file: check the path")
    if allow_pickle:
        return _old_values(path)
    try:
        stored = check_zip(path)
        is_old = _protocol(path) > PROTOCOL
    except UserError as error:
        if "numpy" not in str(error) and "STACK_GLOBAL" not in str(error):
            raise
        is_old = True
    if is_old:
        raise UserError(
            f"'{path}' was written by an older tool: pass --allow_pickle to read it (nothing of it is run), or write "
            "it again"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FAULTS as error:
        raise UserError(f"'{path}' cannot be read as plain numbers ({fault_text(error)}): write it again") from error
    tensors: list[torch.Tensor] = []
    value = _plain(loaded, path, tensors)
    check_storages(path, tensors, stored)
    return value


def _protocol(path: Path) -> int:
    """Of the pickle in a file that ``check_zip`` has passed."""
    with zipfile.ZipFile(path) as archive:
        (table,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        with archive.open(table) as start:
            first = start.read(2)
    return first[1] if first[:1] == b"\x80" else 0


def _old_values(path: Path) -> Any:
    """The numbers of a file whose pickle is read as data."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            tables = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            if len(tables) != 1 or tables[0].file_size > min(MAX_TABLE, size) or tables[0].compress_type:
                raise UserError(f"'{path}' is not laid out as torch.save does it: write it again")
            root = tables[0].filename.removesuffix("data.pkl")

            def stored(key: str) -> bytes:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.file_size > size or entry.compress_type:
                    raise UserError("its data is not laid out as torch.save does it")
                return archive.read(entry)

            return _plain(read_values(archive.read(tables[0]), str(path), stored), path, [])
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        raise UserError(f"'{path}' is not a file of torch.save (since 1.6), or was cut: write it again") from error


def _for_torch(value: object) -> object:
    if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(value.view(np.uint16), order="C", copy=True)).view(torch.bfloat16)
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


def _plain(value: object, path: Path, tensors: list[torch.Tensor], depth: int = 0) -> Any:
    """Python's numbers, lists and numpy arrays of what was loaded; each tensor is added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensor = checked_tensor(path, "its tensor", value)
        tensors.append(tensor)
        return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C", copy=True)
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple) and depth < 2:
        if depth and len(value) > MOST_NUMBERS:
            raise UserError(f"'{path}' holds a list of {len(value)} numbers, more than {MOST_NUMBERS}: it is no split")
        if not depth and sum(len(item) for item in value if isinstance(item, list | tuple)) > MOST_NUMBERS:
            raise UserError(f"'{path}' holds lists of more than {MOST_NUMBERS} numbers: it is no split")
        return [_plain(item, path, tensors, depth + 1) for item in value]
    if isinstance(value, dict) and depth == 0 and all(isinstance(name, str) for name in value):
        return {name: _plain(item, path, tensors, 2) for name, item in value.items()}
    raise UserError(f"'{path}' holds a {type(value).__name__}, not plain numbers: write it again")
