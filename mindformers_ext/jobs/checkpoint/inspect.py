# SPDX-License-Identifier: Apache-2.0
"""What a weight file or folder of any format holds: names, shapes, types, bytes, layout, description. Reads no data but
the ends of tensors, for the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.dtypes import BY_NUMPY
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import read_meta, sidecar
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.formats.safetensors_file import SafetensorsFile
from mindformers_ext.formats.tensors import TensorInfo, TensorReader
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import describe_checkpoint, described_layout, open_hf

MINDSPORE = "model.tok_embeddings.embedding_weight"


@dataclass(frozen=True)
class Inspection:
    """``layout`` and ``description`` are None where nothing tells; ``notes`` say what does not fit together."""

    path: Path
    kind: str
    tensors: tuple[TensorInfo, ...]
    fingerprint: str
    layout: str | None
    description: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all data."""
        return sum(info.nbytes for info in self.tensors)

    def types(self) -> dict[str, int]:
        """Bytes by type."""
        result: dict[str, int] = {}
        for info in self.tensors:
            result[type_name(info)] = result.get(type_name(info), 0) + info.nbytes
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tensors = [
            {"name": info.name, "shape": list(info.shape), "dtype": type_name(info), "bytes": info.nbytes}
            for info in self.tensors
        ]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "layout": self.layout,
            "bytes": self.nbytes,
            "fingerprint": self.fingerprint,
            "description": self.description,
            "notes": list(self.notes),
            "tensors": tensors,
        }


def inspect_ckpt(path: Path) -> Inspection:
    """Look at a .ckpt or .safetensors file, a PyTorch file, or a Hugging Face folder.

    Raises:
        UserError: no weights there, or none that are whole.
    """
    if path.is_dir() and rank_folders(path):
        raise UserError(f"'{path}' holds the slices of several ranks: give one of their files")
    kind = _kind(path)
    if kind == "MindSpore .ckpt":
        with closing(CkptFile(path)) as reader:
            return _inspect(path, kind, reader)
    if path.is_file() and path.suffix == ".safetensors":
        with closing(SafetensorsFile(path)) as reader:
            return _inspect(path, kind, reader)
    with closing(open_hf(path)) as reader:
        return _inspect(path, kind, reader)


def type_name(info: TensorInfo) -> str:
    """The type's long name; text of a .ckpt is "text"."""
    return BY_NUMPY[info.dtype].long if info.dtype in BY_NUMPY else "text"


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    return {".ckpt": "MindSpore .ckpt", ".safetensors": ".safetensors file"}.get(path.suffix, "PyTorch file")


def _inspect(path: Path, kind: str, reader: TensorReader) -> Inspection:
    notes = list(notes_of(reader))
    layout: str | None = None
    description = None
    mark = fingerprint(reader)
    if isinstance(reader, (CkptFile, SafetensorsFile)):
        meta = read_meta(path, reader)
        description = meta.summary() if meta else None
        if meta and meta.hash and meta.hash != mark:
            notes.append(f"'{sidecar(path)}' describes another checkpoint")
            meta = None
        if MINDSPORE in reader.infos:
            try:
                known = describe_checkpoint(reader, meta)
                layout = str(known.layout)
                notes += known.notes
            except UserError as error:
                layout = str(described_layout(meta)) if meta else None
                notes.append(str(error))
    return Inspection(path, kind, tuple(reader.infos.values()), mark, layout, description, tuple(notes))
