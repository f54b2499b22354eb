# SPDX-License-Identifier: Apache-2.0
"""A PyTorch weight file (``.bin``, ``.pt``) as numpy arrays. ``weights_only`` runs no code of it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.pt.pickle_table import MAX_TABLE, check_table

# What damaged or hostile files make torch.load raise.
FAULTS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    UnicodeDecodeError,
    NotImplementedError,
    zipfile.BadZipFile,
)


NESTED = ("state", "model")
DEPTH = 8  # of tables in tables


def _tensors_in(value: object, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor in tables and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth < DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, depth + 1)


class TorchFile:
    """The tensors of one file, mapped from the disk, not read. bfloat16 comes as its bits (uint16)."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            UserError: not a zip file of torch.save, damaged, or holding anything but plain tensors.
        """
        self.path = path
        stored = check_zip(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FAULTS as error:
            raise UserError(
                f"'{path}' cannot be read as plain tensors ({fault_text(error)}): it is damaged, or holds Python "
                "objects, which are never run. Save the model as safetensors"
            ) from error
        everything = list(_tensors_in(loaded))
        inner = loaded
        for key in NESTED:  # as Composer's trainer saves; what else such a file holds is left alone
            inner = inner.get(key) if isinstance(inner, dict) else None
        loaded = inner if isinstance(inner, dict) else loaded
        if not isinstance(loaded, dict):
            raise UserError(f"'{path}' holds a {type(loaded).__name__}, not tensors by name: save model.state_dict()")
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in loaded.items():
            self._tensors[str(name)] = self._checked(name, tensor)
        check_storages(path, everything, stored)

    @property
    def infos(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and torch's name of the type ("float32", "bfloat16", ...) of each tensor."""
        return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self._tensors.items()}

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """A copy of a part of a tensor."""
        part = self._tensors[name][index] if index else self._tensors[name]
        bits = part.contiguous().view(torch.uint16) if part.dtype == torch.bfloat16 else part
        return np.array(bits.numpy(), order="C", copy=True)

    def _checked(self, name: object, tensor: object) -> torch.Tensor:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"'{self.path}' holds {name!r} of type {type(tensor).__name__}, not a tensor by name: "
                "save model.state_dict()"
            )
        return checked_tensor(self.path, f"'{name}'", tensor)


def checked_tensor(path: Path, what: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that ``what`` names, without its history; one that is not plain data is a ``UserError``."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"'{path}': {what} is sparse, quantised or without data: save it as a plain tensor")
    # a small storage spread over a large shape (strides of 0) would fill the memory when read
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"'{path}': {what} {tuple(tensor.shape)} has less data than its shape needs")
    return tensor.detach()


def check_storages(path: Path, tensors: Iterable[torch.Tensor], stored: list[int]) -> None:
    """What ``tensors`` map must be the file's entries: torch maps what the table says, beyond an entry's end too.

    stored: the entries' sizes, from ``check_zip``.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    mapped = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    if sorted(mapped.values()) != stored:
        raise UserError(f"'{path}' is damaged: its table of tensors and its data differ in size; copy it again")


def fault_text(error: BaseException) -> str:
    """A few words; torch's own text goes on to advise loading the file with all its code."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"it asks to run {named[1]}"
    text = str(error).strip().splitlines()
    return text[0][:200] if text and "eights only load" not in text[0] else type(error).__name__


def check_zip(path: Path) -> list[int]:
    """torch.save has written zip files since 1.6, nothing compressed; mapping works with those alone.

    Returns the sizes of the stored data, sorted, zeros left out.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"'{path}' is not laid out as torch.save does it: save the model as safetensors")
            for entry in entries:
                if entry.filename.endswith("data.pkl") and entry.file_size <= min(MAX_TABLE, size):
                    check_table(archive.read(entry), str(path))
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, IndexError) as error:
        raise UserError(
            f"'{path}' is not a file of torch.save (since 1.6), or was cut: copy it again, or save it anew"
        ) from error
    larger = [entry for entry in entries if entry.file_size > size]
    tables = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if larger or len(tables) != 1 or tables[0].file_size > MAX_TABLE:
        raise UserError(f"'{path}' is not laid out as torch.save does it: save the model as safetensors")
    return sorted(
        entry.file_size for entry in entries if entry.file_size and re.search(r"(^|/)data/\d+$", entry.filename)
    )
