# SPDX-License-Identifier: Apache-2.0
"""A whole MindSpore checkpoint of either format, with what the tensors alone cannot tell.

A ``.ckpt`` has no place for metadata, so it lies beside it in ``X.ckpt.json``; a ``.safetensors`` carries the same text
in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import SETTINGS, JsonError, parse_json
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.tensors import TensorInfo

SUFFIXES = (".ckpt", ".safetensors")
LAYOUTS = ("dense", "gmm")
VERSION = 2
FIELDS_1 = {"config": dict, "dtype": str, "source": str, "layout": str, "version": int}
FIELDS = {**FIELDS_1, "qkv_concat": bool, "experts": int, "source_hash": str, "hash": str}
KEY = "mindformers_ext"


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What made the checkpoint.

    ``layout`` tells how the experts lie ("dense": (E, F, D) and (E, D, F), "gmm": the last two axes swapped), which
    shapes cannot when F = D; ``qkv_concat`` whether q, k, v are one tensor; ``experts`` how many there are (0: dense).
    ``config`` is the model's Hugging Face ``config.json``, empty where it was never told; ``dtype`` the weights' type,
    "mixed" if there are several; ``source`` where they came from. ``source_hash`` and ``hash`` are fingerprints of the
    source and of the checkpoint itself (``formats.fingerprint``), "" where unknown; a .safetensors has no ``hash``,
    as its description cannot lie beside another file.
    """

    config: Mapping[str, Any]
    dtype: str
    source: str
    layout: str = "dense"
    qkv_concat: bool = False
    experts: int = 0
    source_hash: str = ""
    hash: str = ""
    version: int = VERSION

    def to_text(self) -> str:
        """JSON, read back by ``from_text``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def summary(self) -> dict[str, Any]:
        """All but the configuration, for people."""
        return {name: value for name, value in asdict(self).items() if name != "config"}

    @staticmethod
    def from_text(text: str | bytes, where: str) -> CheckpointMeta:
        """Parse; anything but the fields above, with their types, is a ``UserError`` that names ``where``."""
        try:
            values = parse_json(text)
        except JsonError as error:
            raise UserError(f"{where} is not JSON ({error}): remove it and pass --config") from error
        problems = Problems(where)
        fields = FIELDS_1 if isinstance(values, dict) and values.get("version") == 1 else FIELDS
        if not isinstance(values, dict) or set(values) != set(fields):
            problems.add("it does not hold " + ", ".join(fields), "remove it and pass --config")
            problems.raise_if_any()
        for name, kind in fields.items():
            if type(values[name]) is not kind:
                problems.add(f"{name}={values[name]!r}", f"expected {kind.__name__}")
        problems.one_of("version", values["version"], (1, VERSION))
        problems.one_of("layout", values["layout"], LAYOUTS)
        problems.raise_if_any()
        return CheckpointMeta(**values)


def sidecar(path: Path) -> Path:
    """Where the metadata of a ``.ckpt`` lies."""
    return path.with_name(path.name + ".json")


def check_suffix(path: Path) -> None:
    """A checkpoint's name ends in .ckpt or .safetensors; anything else is a ``UserError``."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' must end in {' or '.join(SUFFIXES)}: the ending chooses the format")


def open_checkpoint(path: Path) -> CkptFile | SafetensorsFile:
    """A reader of the file; a CRC inside a ``.ckpt`` is checked first (one pass over the file)."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: give one checkpoint file (*.ckpt or *.safetensors)")
    check_suffix(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    reader = CkptFile(path)
    try:
        reader.check_crc()
    except UserError:
        reader.close()
        raise
    return reader


def read_meta(path: Path, reader: CkptFile | SafetensorsFile) -> CheckpointMeta | None:
    """The metadata of an open checkpoint, or None where others wrote it."""
    if isinstance(reader, SafetensorsFile):
        text = reader.metadata.get(KEY)
        return CheckpointMeta.from_text(text, f"the header of '{path}'") if text is not None else None
    beside = sidecar(path)
    if not beside.is_file():
        return None
    with beside.open("rb") as file:
        return CheckpointMeta.from_text(file.read(SETTINGS.nbytes + 1), f"'{beside}'")


def open_writer(
    partial: Path, suffix: str, targets: Sequence[TensorInfo], meta: CheckpointMeta
) -> CkptWriter | SafetensorsFileWriter:
    """A writer to ``partial`` in the format of ``suffix``. A ``.ckpt``'s metadata is the caller's to put beside."""
    if suffix == ".ckpt":
        return CkptWriter(partial)
    return SafetensorsFileWriter(partial, targets, {"format": "ms", KEY: meta.to_text()})
