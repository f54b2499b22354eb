# SPDX-License-Identifier: Apache-2.0
"""``*.importance.npz``: what a pass has measured of every unit of a model, and of which model and text it is.

Any number of targets is cut from one file without running the model again.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import parse_json
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.prune.masks_file import MOST_BYTES, read_shape, sizes_of
from mindformers_ext.surgery.prune.importance import KINDS, shape_of_statistic

ABOUT, PROVENANCE, SOURCE = "about", "sha256", "source"
AGAIN = "write it again with 'prune.py shape --remake_importance'"


@dataclass(frozen=True, eq=False)
class Importance:
    """``statistics`` by the names of ``surgery.prune.importance.KINDS``; ``about``: of what they are."""

    source: ModelShape
    statistics: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The passes whose numbers are all there."""
        return tuple(kind for kind, names in KINDS.items() if not set(names) - set(self.statistics))


def provenance(about: Mapping[str, Any]) -> str:
    """SHA-256 over what was measured on what: weights, rows of tokens, engine, device."""
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def write_importance_file(path: Path, found: Importance) -> None:
    """Write the file whole, in place of an older one; the same numbers give the same bytes."""
    text = json.dumps(dict(found.about), sort_keys=True)
    arrays: dict[str, Any] = {name: np.asarray(value, np.float64) for name, value in found.statistics.items()}
    arrays |= {SOURCE: sizes_of(found.source), ABOUT: np.array(text), PROVENANCE: np.array(provenance(found.about))}
    with fresh_file(path, overwrite=True) as partial, partial.open("wb") as file:
        np.savez(file, **{name: arrays[name] for name in sorted(arrays)})


def read_importance_file(path: Path) -> Importance:
    """The numbers in ``path``.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(item.file_size for item in archive.infolist()) > 8 * MOST_BYTES:
                raise UserError(f"'{path}' unpacks to more than {8 * MOST_BYTES} bytes: this is no model's importance")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        about = parse_json(str(found.pop(ABOUT)[()]))
        told = str(found.pop(PROVENANCE)[()])
        source = read_shape(found.pop(SOURCE), path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' holds no importance ({error}): {AGAIN}") from error
    if not isinstance(about, dict) or provenance(about) != told:
        raise UserError(f"'{path}' is not what its sha256 says: {AGAIN}")
    for name, value in found.items():
        dims = next((names[name] for names in KINDS.values() if name in names), None)
        if dims is None or value.dtype != np.float64 or value.shape != shape_of_statistic(dims, source):
            raise UserError(f"'{path}' holds '{name[:80]}', which does not fit its model's sizes: {AGAIN}")
        if not np.isfinite(value).all():
            raise UserError(f"'{path}': {name} holds values that are no numbers: {AGAIN}")
    result = Importance(source, found, about)
    if "forward" not in result.kinds:
        raise UserError(f"'{path}' lacks numbers of a whole pass: {AGAIN}")
    return result
