# SPDX-License-Identifier: Apache-2.0
"""The cosines between the models of a merge, and their picture.

Colours mean the same in every picture: weights from 0 to 1, task vectors from -1 to 1.
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.jobs.run.plot import open_pyplot, save_figure

WEIGHTS, CHANGES = "weights", "task vectors"
RANGES = {WEIGHTS: (0.0, 1.0, "cividis"), CHANGES: (-1.0, 1.0, "PuOr")}  # lowest, highest, colours
EXPERT = re.compile(r"(.*)\bexperts\.\d+\.(.+)")
WRITTEN = 320  # cells of a heatmap that still get their number written in
NAMED = 6  # models whose names stand in the title


@dataclass(frozen=True)
class Line:
    """One cosine: ``what`` of two models, in one tensor. ``layer`` None: the tensor belongs to no layer."""

    what: str
    kind: str
    layer: int | None
    first: str
    second: str
    cosine: float
    matrix: bool


def mean_cosine(lines: Sequence[Line]) -> float:
    """Of the lines that have one; NaN where none has."""
    values = [line.cosine for line in lines if np.isfinite(line.cosine)]
    return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class Row:
    """One row of a heatmap: a value per layer, or one for all (``whole``)."""

    name: str
    values: np.ndarray
    whole: bool = False


def rows_of(lines: Sequence[Line], layers: int) -> list[Row]:
    """Matrices by kind, a value per layer: the mean over pairs of models. Those of no layer stand first and last, as
    in the network. Experts are one row for all, and one for the one that is least alike, which a mean would hide."""
    cells: dict[tuple[str, int | None], list[Line]] = defaultdict(list)
    for line in lines:
        cells[line.kind, line.layer].append(line)
    means = {place: mean_cosine(held) for place, held in cells.items()}

    def whole(kind: str) -> Row:
        return Row(kind.removeprefix("model."), np.full(layers, means[kind, None]), whole=True)

    kinds = list(dict.fromkeys(line.kind for line in lines if line.layer is not None))
    merged: dict[str, list[str]] = {}
    for kind in kinds:
        match = EXPERT.fullmatch(kind)
        merged.setdefault(f"{match[1]}experts.{match[2]}" if match else kind, []).append(kind)
    loose = list(dict.fromkeys(line.kind for line in lines if line.layer is None))
    result = [whole(kind) for kind in loose if "embed" in kind]
    for name, members in merged.items():
        each = np.array([[means.get((kind, layer), np.nan) for layer in range(layers)] for kind in members])
        if len(members) == 1:
            result.append(Row(name, each[0]))
        else:
            result.append(Row(f"{name}, mean of {len(members)}", _over(np.nanmean, each)))
            result.append(Row(f"{name}, lowest of {len(members)}", _over(np.nanmin, each)))
    return result + [whole(kind) for kind in loose if "embed" not in kind]


def _over(function: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
    """``function`` down the columns that have a number."""
    result = np.full(values.shape[1], np.nan)
    known = np.isfinite(values).any(axis=0)
    result[known] = function(values[:, known], axis=0)
    return result


def write_picture(lines: Sequence[Line], path: Path) -> None:
    """A heatmap over matrices and layers for each of weights and task vectors.

    Vectors stay out: those of norms are alike in any two models.
    """
    pyplot = open_pyplot()
    lines = [line for line in lines if line.matrix]
    shown = [what for what in RANGES if any(line.what == what for line in lines)] or [WEIGHTS]
    layers = max((line.layer for line in lines if line.layer is not None), default=0) + 1
    tables = {what: rows_of([line for line in lines if line.what == what], layers) for what in shown}
    heights = [max(2.0, 1.0 + 0.3 * len(rows)) for rows in tables.values()]
    width = max(7.0, 3.2 + 0.42 * layers)
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(width, sum(heights) + 0.5), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    names = list(dict.fromkeys(name for line in lines for name in (line.first, line.second)))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    title = "Cosines, mean over pairs of: " + ", ".join(names[:NAMED]) + more
    figure.suptitle(textwrap.fill(title, int(11 * width)), fontsize=10)
    for axes, (what, rows) in zip(panels[:, 0], tables.items(), strict=True):
        _panel(figure, axes, what, rows, layers)
    save_figure(figure, path)


def _panel(figure: Any, axes: Any, what: str, rows: Sequence[Row], layers: int) -> None:
    low, high, colours = RANGES[what]
    values = np.array([row.values for row in rows]) if rows else np.full((1, layers), np.nan)
    image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label="cosine", pad=0.015, extend="min" if what == WEIGHTS else "neither")
    axes.set_title(what.capitalize() + ("" if what == WEIGHTS else " (a model minus its base)"))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlabel("layer of the merge; embeddings and head belong to none")
    axes.set_xticks(range(0, layers, -(-layers // 16)))
    axes.grid(False)
    if values.size > WRITTEN:
        return
    for place, row in enumerate(rows):
        for column in [(layers - 1) / 2] if row.whole else range(layers):
            value = row.values[0 if row.whole else int(column)]
            if np.isfinite(value):
                dark = value < (low + high) / 2 if what == WEIGHTS else abs(value) > 0.6
                colour = "white" if dark else "black"
                axes.text(column, place, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
