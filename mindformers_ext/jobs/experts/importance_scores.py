# SPDX-License-Identifier: Apache-2.0
"""Importance of neurons as files: a folder per data cluster, in it a vector (width,) per layer and matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.jobs.engine.door import read_numbers

META = "importance.json"
OPTIONS = {"kernel": "kernel", "level": "accumulate_level", "type": "importance_type"}


def score_folders(folder: Path) -> tuple[Path, ...]:
    """The folders of the data clusters, by their numbers ("10" behind "2"), not as text.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"--score_file_path '{folder}' is no folder: give the one with a folder per data cluster")
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise UserError(f"--score_file_path '{folder}' holds no folder per data cluster: compute importance first")
    return tuple(sorted(found, key=lambda path: [(int(n or 0), text) for text, n in _parts(path.name)]))


def check_importance(folder: Path, made: Mapping[str, str], layer: int, weights: str) -> None:
    """What ``importance.json`` in ``folder`` tells must fit; scores of another tool have none.

    Args:
        folder: where the scores lie.
        made: kernel, level and type that they must be made with.
        layer: that will be read.
        weights: fingerprint of the model that they must be of.

    Raises:
        UserError: unfinished, made otherwise, or of another model.
    """
    path = folder / META
    if not path.is_file():
        if any(folder.glob(".sums_*")) or any(folder.glob(".states_*")):
            raise UserError(f"'{folder}' holds importance that is not finished: run the stage importance again")
        return
    about = read_object(path).get("about", {})
    differing = [f"--{OPTIONS[name]} {about.get(name)}" for name, value in made.items() if about.get(name) != value]
    if differing:
        raise UserError(f"'{folder}' was made with {', '.join(differing)}: give the same here")
    if about.get("weights") != weights:
        raise UserError(f"'{folder}' is of other weights than --model_path has: run the stage importance again")
    if layer not in about.get("layers", ()):
        raise UserError(f"'{folder}' holds no importance of layer {layer}: run the stage importance with it")


def read_scores(folder: Path, name: str, experts: int, width: int, allow_pickle: bool = False) -> np.ndarray:
    """float64 (experts, width) from the file ``name`` of the first ``experts`` clusters.

    Raises:
        UserError: a file is missing, of another width, or holds values that are no numbers.
    """
    rows = []
    for cluster in score_folders(folder)[:experts]:
        path = cluster / name
        if not path.is_file():
            raise UserError(f"'{path}' does not exist: compute importance with these --templates and --importance_type")
        row = np.asarray(read_numbers(path, allow_pickle), np.float64)
        if row.shape != (width,):
            raise UserError(f"'{path}' has shape {row.shape}, the model has {width} neurons: give this model's scores")
        if not np.isfinite(row).all():
            raise UserError(f"'{path}' holds NaN or infinity: compute importance again")
        rows.append(row)
    return np.stack(rows)


def _parts(name: str) -> list[tuple[str, str]]:
    return re.findall(r"(\D*)(\d*)", name)
