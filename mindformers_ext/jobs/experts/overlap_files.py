# SPDX-License-Identifier: Apache-2.0
"""How much experts overlap, as tables and pictures: for splits by importance whose experts share neurons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mindformers_ext.formats.atomic import fresh_file, write_text
from mindformers_ext.surgery.experts.gradient import overlap
from mindformers_ext.surgery.experts.split import LayerSplit

TOTAL = "total_neurons.txt"
INCHES = (5.5, 5.0)


def write_overlap(folder: Path, splits: Mapping[int, LayerSplit]) -> None:
    """Into ``folder``: per layer ``overlap_count_layerN.csv``, ``overlap_rate_layerN.csv`` and ``overlap_layerN.png``
    (residual experts first), and ``total_neurons.txt``, how many neurons any expert holds."""
    folder.mkdir(parents=True, exist_ok=True)
    total = []
    for layer, split in splits.items():
        count, rate = overlap(split)
        write_text(folder / f"overlap_count_layer{layer}.csv", _table(count, "d"))
        write_text(folder / f"overlap_rate_layer{layer}.csv", _table(rate, ".6f"))
        _picture(folder / f"overlap_layer{layer}.png", count, rate, layer)
        held = np.unique(np.concatenate((*split.residual, *split.experts))).size
        total.append(f"layer {layer}: {held} of {split.width}\n")
    write_text(folder / TOTAL, "".join(total))


def _table(values: np.ndarray, form: str) -> str:
    return "".join(",".join(format(value, form) for value in row) + "\n" for row in values.tolist())


def _picture(path: Path, count: np.ndarray, rate: np.ndarray, layer: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rate, vmin=0, vmax=1, cmap="Blues")
    if len(count) <= 16:
        for (row, column), value in np.ndenumerate(count):
            color = "white" if rate[row, column] > 0.5 else "black"
            axes.text(column, row, str(value), ha="center", va="center", fontsize=6, color=color)
    axes.set(title=f"neurons that two experts share, layer {layer}", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="share of both together")
    with fresh_file(path, overwrite=True) as partial, partial.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
