# SPDX-License-Identifier: Apache-2.0
"""``expert_neurons.npz`` beside a mixture's weights: where each expert's neurons were in the dense model."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import flush
from mindformers_ext.jobs.experts.cut import splits_of
from mindformers_ext.surgery.experts.split import LayerSplit

NEURONS = "expert_neurons.npz"
MOST_BYTES = 2**28  # of the file unpacked; 126 layers of 53,248 neurons are 27 MB


def write_neurons(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``jobs.experts.cut.ids_of``'s arrays; the same arrays give the same bytes."""
    with path.open("wb") as file:
        ordered: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
        np.savez(file, **ordered)
    flush(path)


def read_neurons(path: Path, width: int, layers: int) -> dict[int, LayerSplit] | None:
    """The splits that the file tells of a model of ``layers`` layers and ``width`` neurons; None where there is none.

    Raises:
        UserError: damaged, or of another model.
    """
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(item.file_size for item in archive.infolist()) > MOST_BYTES:
                raise UserError(f"'{path}' unpacks to more than {MOST_BYTES} bytes: it tells of no model's neurons")
        with np.load(path, allow_pickle=False) as arrays:
            return splits_of({name: arrays[name] for name in arrays.files}, width, layers)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"'{path}' does not say where the neurons of {layers} layers were ({error}): copy it again, or remove it "
            "and give --split_file_path"
        ) from error
