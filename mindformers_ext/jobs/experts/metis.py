# SPDX-License-Identifier: Apache-2.0
"""The graph of a layer as METIS' file, and its parts: from ``gpmetis`` where it is on the PATH, else our own."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import fresh_file, write_text
from mindformers_ext.surgery.experts.graph import (
    HEAVIEST,
    coactivation,
    cut_weight,
    edge_weights,
    metis_lines,
    rebalance,
    spectral_parts,
)
from mindformers_ext.surgery.experts.split import LayerSplit

PROGRAM = "gpmetis"


def split_graph(
    shards: Iterable[np.ndarray],
    width: int,
    experts: int,
    kernel: str,
    threshold: float,
    seed: Sequence[int],
    file: Path,
) -> tuple[LayerSplit, dict[str, Any]]:
    """Equal parts of the graph of ``shards``, which is written to ``file`` as well, and figures about them.

    A file of parts that lies beside already (``FILE.part.E``, as ``gpmetis`` writes it) of the same graph is used,
    unless it is our own of another seed.
    """
    weights = edge_weights(coactivation(shards, width, kernel, threshold))
    parts = file.with_name(f"{file.name}.part.{experts}")
    same = _write_graph(file, weights)
    program = shutil.which(PROGRAM)
    if experts == 1:
        labels, by = np.zeros(width, np.int64), "nothing to cut"
    elif same and parts.is_file() and _is_of(parts, seed):
        labels, by = read_parts(parts, width, experts), parts.name
    elif program:
        labels, by = _run_gpmetis(program, file, parts, width, experts, seed), PROGRAM
    else:
        labels, by = spectral_parts(weights, experts, seed), "spectral"
    labels = rebalance(labels, experts, weights, seed)
    edges = int(np.count_nonzero(weights)) // 2
    return LayerSplit.from_labels(labels, experts), {"edges": edges, "cut": cut_weight(weights, labels), "by": by}


def graph_bytes(width: int) -> int:
    """Bytes of a graph's file and its parts at most."""
    return width * (width * (len(str(width)) + len(str(HEAVIEST)) + 2) + 8)


def _noted(parts: Path) -> Path:
    """Beside a file of parts that was made here: which one it is, and of which seed."""
    return parts.with_name(f"{parts.name}.json")


def _is_of(parts: Path, seed: Sequence[int]) -> bool:
    """Whether a file of parts is of this seed, or of somebody who ran ``gpmetis`` by hand."""
    note = read_object(_noted(parts)) if _noted(parts).is_file() else {}
    return note.get("sha256") != sha256(parts.read_bytes()).hexdigest() or note.get("seed") == list(seed)


def _write_graph(file: Path, weights: np.ndarray) -> bool:
    """Whether ``file`` was this very graph before."""
    with fresh_file(file, overwrite=True) as partial:
        with partial.open("w", encoding="ascii") as lines:
            lines.writelines(f"{line}\n" for line in metis_lines(weights))
        return file.is_file() and filecmp.cmp(file, partial, shallow=False)


def read_parts(path: Path, width: int, experts: int) -> np.ndarray:
    """Labels (width,) from a file with one per line.

    Raises:
        UserError: another number of lines, or a line that is no label.
    """
    lines = path.read_text("ascii", "replace").split()
    if len(lines) != width or not all(line.isdecimal() and len(line) < 8 and int(line) < experts for line in lines):
        raise UserError(
            f"'{path}' is no list of {width} parts from 0 to {experts - 1}: remove it, or run {PROGRAM} again"
        )
    return np.array([int(line) for line in lines], np.int64)


def _run_gpmetis(program: str, file: Path, parts: Path, width: int, experts: int, seed: Sequence[int]) -> np.ndarray:
    command = [program, f"-seed={sum(seed) % 2**31}", str(file.absolute()), str(experts)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not parts.is_file():
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [""]
        raise UserError(
            f"{PROGRAM} ended with code {done.returncode} ({last[0][:200]}): mend it, or take it off the PATH"
        )
    labels = read_parts(parts, width, experts)
    note = {"seed": list(seed), "sha256": sha256(parts.read_bytes()).hexdigest()}
    write_text(_noted(parts), json.dumps(note) + "\n")
    return labels
