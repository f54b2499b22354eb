# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE v2's files of a value per layer: gates, importance scores, neuron indices, distributions; .pt, .npz, .json.

In memory a layer is arrays by name: a gate "gate" (E, D); scores "0", "1", ... of the clusters, (I) each; indices "0",
"1", ... of the experts, and "residual" of what every token passes; a distribution "attn.number", "attn.mean" (D),
"attn.variance" (D) of what attention adds, and "mlp. ..." of what the feed-forward part adds. A .pt is laid out as the
published programs read and write it, and what it was made from stands in a JSON beside it; the other two hold that
themselves and need no torch.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import TABLES, read_json, read_object
from mindformers_ext.formats.atomic import fresh_file, refuse_existing, write_text
from mindformers_ext.jobs.engine.door import read_tables, write_tables

GATES, SCORES, INDICES, DISTRIBUTION = "gate_weights", "importance_scores", "neuron_indices", "distribution"
GATE, RESIDUAL, ABOUT = "gate", "residual", "about"
PARTS, MOMENTS = ("attn", "mlp"), ("number", "mean", "variance")
SUFFIXES = (".pt", ".npz", ".json")
FORMATS = tuple(suffix[1:] for suffix in SUFFIXES)
MOST_BYTES = 2**32  # of a file unpacked: gates of 126 layers of 64 experts, 16384 wide, are 0.5 GB
MOST_LAYERS = 2000
Layer = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """``kind``: one of the four above. ``about``: what it was made from, sha256 by name; empty where nobody tells."""

    kind: str
    layers: Mapping[int, Layer]
    about: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path()

    @property
    def digest(self) -> str:
        """sha256 of what it holds, the same in every format."""
        hashed = sha256(self.kind.encode())
        for number in sorted(self.layers):
            for name, array in sorted(self.layers[number].items()):
                hashed.update(f"\n{number} {name} {array.shape}\n".encode())
                hashed.update(np.ascontiguousarray(array, "<f4" if array.dtype.kind == "f" else "<i8").tobytes())
        return hashed.hexdigest()

    def check_made_from(self, **wanted: str | None) -> None:
        """What it tells of its origin must be what is given now; None: nothing is given.

        Raises:
            UserError: it was made from another.
        """
        for name, digest in wanted.items():
            told = self.about.get(name)
            if digest is not None and told is not None and told != digest:
                raise UserError(
                    f"'{self.path}' was made from other {name.replace('_', ' ')} (sha256 {str(told)[:12]}...) than is "
                    f"given ({digest[:12]}...): give the one that it was made from, or make it again"
                )


def check_suffix(path: Path) -> None:
    """``UserError`` for a file of another format."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' is of no known format: choose a name that ends in {', '.join(SUFFIXES)}")


def write_table(path: Path, table: LayerTable, overwrite: bool = False) -> None:
    """Write it in the format of the suffix."""
    check_suffix(path)
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"kind": table.kind, **table.about}
    if path.suffix == ".pt":
        beside = beside_of(path)  # first, so that where the file stands the stage is over
        write_text(beside, json.dumps({**told, "holds": table.digest}, indent=1) + "\n")
        try:
            write_tables(
                path, {number: _as_published(table.kind, layer) for number, layer in table.layers.items()}, overwrite
            )
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    elif path.suffix == ".npz":
        named: dict[str, Any] = {f"{n}.{name}": a for n, layer in table.layers.items() for name, a in layer.items()}
        with fresh_file(path, overwrite) as partial, partial.open("wb") as file:
            np.savez(file, **{ABOUT: np.array(json.dumps(told))}, **named)
    else:
        layers = {str(n): {name: a.tolist() for name, a in layer.items()} for n, layer in table.layers.items()}
        with fresh_file(path, overwrite) as partial:
            partial.write_text(json.dumps({ABOUT: told, "layers": layers}) + "\n", "utf-8")


def read_table(path: Path, kind: str) -> LayerTable:
    """The table of that kind in a file.

    Raises:
        UserError: not such a file, damaged, of another kind, or with values that are no numbers.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"'{path}' does not exist or is no file: check the path")
    raw, about = {".pt": _read_pt, ".npz": _read_npz, ".json": _read_json}[path.suffix](path)
    if about.get("kind", kind) != kind:
        raise UserError(f"'{path}' holds {about['kind']}, not {kind}: give the other file")
    if not isinstance(raw, Mapping) or not 1 <= len(raw) <= MOST_LAYERS:
        raise UserError(f"'{path}' holds no table of layers: give the file of {kind}")
    layers = {}
    for key, value in raw.items():
        number = _number(key)
        if number is None:
            raise UserError(f"'{path}' has a layer called {str(key)[:40]!r}: layers are numbers from 0")
        layers[number] = _READERS[kind](value, f"'{path}', layer {number}")
    table = LayerTable(kind, dict(sorted(layers.items())), about, path)
    if "holds" in about and about["holds"] != table.digest:
        raise UserError(f"'{beside_of(path)}' tells of another file than '{path}': remove it, or make both again")
    return table


def beside_of(path: Path) -> Path:
    """Where a .pt says what it was made from."""
    return path.with_name(path.name + ".json")


def _as_published(kind: str, layer: Layer) -> Any:
    if kind == GATES:
        return layer[GATE].astype(np.float32)
    if kind == SCORES:
        return {int(name): array.astype(np.float32) for name, array in layer.items()}
    if kind == DISTRIBUTION:
        parts = {name.partition(".")[0] for name in layer}
        return {part: {name: _published_moment(layer[f"{part}.{name}"]) for name in MOMENTS} for part in sorted(parts)}
    if RESIDUAL not in layer:
        return [array.tolist() for array in layer.values()]
    return {name if name == RESIDUAL else int(name): array.tolist() for name, array in layer.items()}


def _published_moment(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _read_pt(path: Path) -> tuple[Any, Mapping[str, Any]]:
    beside = beside_of(path)
    return read_tables(path), read_object(beside) if beside.is_file() else {}


def _read_npz(path: Path) -> tuple[Any, Mapping[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(item.file_size for item in archive.infolist()) > MOST_BYTES:
                raise UserError(f"'{path}' unpacks to more than {MOST_BYTES} bytes: it is no table of layers")
        layers: dict[str, dict[str, np.ndarray]] = {}
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(str(arrays[ABOUT])) if ABOUT in arrays.files else {}
            for name in arrays.files:
                number, _, part = name.partition(".")
                if name != ABOUT:
                    layers.setdefault(number, {})[part] = arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' cannot be read ({error}): copy it again") from error
    return layers, about if isinstance(about, dict) else {}


def _read_json(path: Path) -> tuple[Any, Mapping[str, Any]]:
    found = read_json(path, "expected a table of layers", TABLES)
    about = found.get(ABOUT) if isinstance(found, dict) else None
    if isinstance(found, dict) and "layers" in found:
        found = found["layers"]
    return found, about if isinstance(about, dict) else {}


def _number(key: object) -> int | None:
    text = str(key)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else None


def _array(value: object, where: str, whole: bool, axes: int) -> np.ndarray:
    wanted = "whole numbers" if whole else "numbers"
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros(0, object)
    if array.dtype.kind not in ("iu" if whole else "iuf") or array.ndim != axes or not array.size:
        raise UserError(f"{where}: {wanted} of {axes} dimension(s) are expected, found shape {array.shape}")
    if not whole and not np.isfinite(array).all():
        raise UserError(f"{where} holds NaN or infinite values: make it again")
    return array.astype(np.int64 if whole else np.float32)


def _gate(value: Any, where: str) -> Layer:
    return {GATE: _array(value[GATE] if isinstance(value, Mapping) and GATE in value else value, where, False, 2)}


def _scores(value: Any, where: str) -> Layer:
    rows = _numbered(value, where, "a score list per cluster")
    found = {str(n): _array(rows[n], f"{where}, cluster {n}", False, 1) for n in range(len(rows))}
    if len({array.size for array in found.values()}) > 1:
        raise UserError(f"{where}: clusters have scores of different lengths")
    return found


def _indices(value: Any, where: str) -> Layer:
    inner = dict(value) if isinstance(value, Mapping) else value
    always = inner.pop(RESIDUAL, None) if isinstance(inner, dict) else None
    rows = _numbered(inner, where, "a list of neurons per expert")
    found = {str(n): _array(rows[n], f"{where}, expert {n}", True, 1) for n in range(len(rows))}
    return found if always is None else {RESIDUAL: _array(always, f"{where}, residual", True, 1), **found}


def _distribution(value: Any, where: str) -> Layer:
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, Mapping) else ():
        flat |= {f"{key}.{name}": one for name, one in item.items()} if isinstance(item, Mapping) else {str(key): item}
    parts = [part for part in PARTS if any(key.startswith(f"{part}.") for key in flat)]
    wanted = {f"{part}.{name}" for part in parts for name in MOMENTS}
    if not parts or set(flat) != wanted:
        found = ", ".join(sorted(flat))[:80]
        raise UserError(f"{where}: expected {' and '.join(PARTS)}, each with {', '.join(MOMENTS)}; found {found}")
    result: dict[str, np.ndarray] = {}
    for part in parts:
        number, *moments = (flat[f"{part}.{name}"] for name in MOMENTS)
        number = (
            number.reshape(-1) if isinstance(number, np.ndarray) else number if isinstance(number, list) else [number]
        )
        arrays = [_array(item, f"{where}, {part}", False, 1) for item in (number, *moments)]
        if arrays[0].size != 1 or arrays[0][0] < 1 or arrays[1].shape != arrays[2].shape or arrays[2].min() < 0:
            expected = "a number of tokens, and means and variances from 0 of one length"
            raise UserError(f"{where}, {part}: {expected} are expected")
        arrays[0] = np.rint(np.asarray(number)).astype(np.int64)
        result |= {f"{part}.{name}": array for name, array in zip(MOMENTS, arrays, strict=True)}
    return result


def _numbered(value: Any, where: str, what: str) -> Mapping[int, Any]:
    """A list, or a table whose keys are 0 .. n - 1."""
    rows = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(rows, Mapping):
        rows = {_number(key): item for key, item in rows.items()}
        if rows and set(rows) == set(range(len(rows))):
            return rows
    raise UserError(f"{where}: expected {what}, numbered from 0")


_READERS: Mapping[str, Callable[[Any, str], Layer]] = {
    **{GATES: _gate, SCORES: _scores, INDICES: _indices, DISTRIBUTION: _distribution}
}
