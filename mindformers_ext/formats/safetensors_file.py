# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: header length (8 bytes, little-endian), JSON header, data.

Own code, because the library's numpy side knows no bfloat16 and writes only from memory; the library is the judge in
the tests. Layout: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import TABLES, JsonError, parse_json
from mindformers_ext.formats.blocks import Block, NewFile, OpenFile, StoredTensor, checked_bytes, read_stored
from mindformers_ext.formats.dtypes import BY_NUMPY, BY_SAFETENSORS
from mindformers_ext.formats.tensors import MOST_TENSORS, Array, Index, TensorInfo

MAX_DIMS = 32  # numpy's arrays have no more
METADATA = "__metadata__"
NARROW = re.compile(r"F[468]_.*")  # floats of 8 bits and fewer


class SafetensorsFile:
    """A ``TensorReader`` of one file. The header is checked whole on opening; data is read on demand."""

    def __init__(self, path: Path) -> None:
        """Open and check; a broken header or a cut file is a ``UserError``."""
        self._file = OpenFile(path)
        try:
            header, start = _header(self._file)
            self.metadata: Mapping[str, str] = _metadata(path, header)
            self._tensors = _tensors(self._file, header, start)
        except UserError:
            self._file.close()
            raise
        self.infos: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or the part that ``index`` selects."""
        return read_stored(self._file, self._tensors[name], index)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _header(file: OpenFile) -> tuple[dict[str, Any], int]:
    raw = file.bytes_at(0, 8)
    length = int.from_bytes(raw, "little")
    if len(raw) < 8 or length > min(TABLES.nbytes, file.size - 8):
        raise UserError(
            f"'{file.path}' is not a safetensors file or was cut: {file.size} bytes, header of {length} bytes promised"
        )
    try:
        header = parse_json(file.bytes_at(8, length), TABLES)
    except JsonError as error:
        raise UserError(f"'{file.path}' is not a safetensors file: its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"'{file.path}' is not a safetensors file: its header is no table")
    return header, 8 + length


def _metadata(path: Path, header: dict[str, Any]) -> Mapping[str, str]:
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"'{path}': {METADATA} must map names to strings")
    return metadata


def _tensors(file: OpenFile, header: Mapping[str, Any], start: int) -> dict[str, StoredTensor]:
    problems = Problems(f"'{file.path}'")
    if len(header) > MOST_TENSORS:
        raise UserError(f"'{file.path}' holds {len(header)} tensors, more than {MOST_TENSORS}: it is no checkpoint")
    tensors: dict[str, StoredTensor] = {}
    _check_types(file.path, header)
    for name, entry in header.items():
        wrong = _entry_fault(entry)
        if wrong:
            problems.add(f"'{name}' {wrong}", "the file is damaged or of a kind this reader does not know")
            continue
        begin, end = entry["data_offsets"]
        info = TensorInfo(name, tuple(entry["shape"]), BY_SAFETENSORS[entry["dtype"]])
        if end - begin != info.nbytes:
            problems.add(f"'{name}' has {end - begin} bytes", f"{info.shape} of {entry['dtype']} needs {info.nbytes}")
        tensors[name] = StoredTensor(info, (Block(start + begin, end - begin),))
    problems.raise_if_any()
    expected = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.blocks[0].offset, tensor.blocks[0].length)):
        if tensor.blocks[0].offset != expected:
            problems.add(f"'{tensor.info.name}' starts at byte {tensor.blocks[0].offset}", f"expected {expected}")
        expected = tensor.blocks[0].offset + tensor.blocks[0].length
    if expected != file.size:
        problems.add(f"the file has {file.size} bytes", f"its header promises {expected}: copy or download it again")
    problems.raise_if_any()
    return tensors


def _check_types(path: Path, header: Mapping[str, Any]) -> None:
    """One line for all tensors of a type that is not read."""
    kinds: dict[str, list[str]] = {}
    for name, entry in header.items():
        kind = entry.get("dtype", "F32") if isinstance(entry, dict) else "F32"  # without one: another fault
        if not isinstance(kind, str) or kind not in BY_SAFETENSORS:
            kinds.setdefault(str(kind)[:20], []).append(name)
    problems = Problems(f"'{path}'")
    for kind, names in kinds.items():
        advice = "weights of 8 bits and fewer are not read: give the model's 16-bit weights"
        if not NARROW.fullmatch(kind):
            advice = f"known are {', '.join(BY_SAFETENSORS)}"
        more = f" and {len(names) - 1} more tensors have" if len(names) > 1 else " has"
        problems.add(f"'{names[0]}'{more} type {kind}", advice)
    problems.raise_if_any()


def _entry_fault(entry: object) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "lacks dtype, shape or data_offsets"
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(type(item) is int and item >= 0 for item in numbers):
            return f"has a wrong {key}: {str(numbers)[:80]}"
        if len(numbers) > MAX_DIMS:
            return f"has {len(numbers)} numbers as {key}, at most {MAX_DIMS} are read"
    offsets = entry["data_offsets"]
    return None if len(offsets) == 2 and offsets[0] <= offsets[1] else f"has wrong data_offsets: {offsets}"


class SafetensorsFileWriter(NewFile):
    """Writes one file from tensors that come one at a time, in any order; names, shapes and types are known before.

    Data lies by falling element size, as the library writes it: every tensor stays aligned to its element.
    """

    def __init__(self, path: Path, targets: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
        """Write the header. ``metadata`` goes into it as it is."""
        header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        offset = 0
        self._turn = Lock()
        self._waiting: dict[str, tuple[TensorInfo, int]] = {}
        for info in sorted(targets, key=lambda info: -info.dtype.itemsize):
            end = offset + info.nbytes
            kind = BY_NUMPY[info.dtype].safetensors
            header[info.name] = {"dtype": kind, "shape": list(info.shape), "data_offsets": [offset, end]}
            self._waiting[info.name] = (info, offset)
            offset = end
        if len(self._waiting) != len(targets):
            raise ValueError("a name occurs twice among the tensors to write")
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        super().__init__(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, array: Array) -> None:
        """Write one tensor to its place."""
        self.add_parts(TensorInfo(name, array.shape, array.dtype), (array,))

    def add_parts(self, info: TensorInfo, parts: Iterable[Array]) -> None:
        """Write one tensor that comes in consecutive ``parts`` (C order, any shapes); the same bytes as ``add``.

        Several threads may write tensors at once.

        Raises:
            ValueError: ``info`` or the parts are not what was announced.
        """
        announced, offset = self._waiting.pop(info.name)
        if info != announced:
            came, wanted = (f"{item.dtype}{item.shape}" for item in (info, announced))
            raise ValueError(f"'{info.name}' came as {came}, announced as {wanted}")
        for done, data in checked_bytes(info, parts):
            with self._turn:
                self._file.seek(self._start + offset + done)
                self._file.write(data)
            del data  # or it lives on while the next one is made

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; a tensor that never came is a mistake of the caller (``ValueError``)."""
        super().__exit__(kind, value, trace)
        if kind is None and self._waiting:
            raise ValueError(
                f"{len(self._waiting)} announced tensors were not written, first {next(iter(self._waiting))}"
            )
