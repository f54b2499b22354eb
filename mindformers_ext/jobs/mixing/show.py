# SPDX-License-Identifier: Apache-2.0
"""Proportions and losses by domain over a run's steps, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.jobs.mixing.runs import DomainCurves, read_curves
from mindformers_ext.jobs.run.plot import open_pyplot, save_figure

PICTURE = "mixture.png"
# Okabe and Ito's eight, the darkest first; more domains take the map "cividis"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def show(run_folder: Path) -> Path:
    """Write ``mixture.png`` into ``run_folder``; returns its path.

    Raises:
        UserError: see ``jobs.mixing.runs.read_curves``.
    """
    return save_figure(_figure(read_curves(run_folder), run_folder.name), run_folder / PICTURE)


def _figure(curves: DomainCurves, title: str) -> Any:
    pyplot = open_pyplot()
    count = len(curves.names)
    colours = COLOURS if count <= len(COLOURS) else pyplot.get_cmap("cividis")(np.linspace(0, 1, count))
    figure, (shares, losses) = pyplot.subplots(2, 1, figsize=(8.5, 6.6), sharex=True)
    drawn = np.diff(curves.rows, axis=0, prepend=0)
    for place, (name, colour) in enumerate(zip(curves.names, colours, strict=False)):
        used = drawn[:, place].sum() / max(drawn.sum(), 1)
        label = f"{name}: {curves.proportions[-1, place]:.3f}, of all rows {used:.3f}"
        shares.plot(curves.step, curves.proportions[:, place], color=colour, drawstyle="steps-post", label=label)
        if len(curves.evaluated):
            last = curves.losses[-1, place]
            losses.plot(curves.evaluated, curves.losses[:, place], ".-", color=colour, label=f"{name}: {last:.3f}")
    top = float(curves.proportions.max())
    shares.set(title=f"{title}: proportions, the last and what was drawn", ylim=(0, min(1.0, 1.08 * top)))
    losses.set(title="loss by domain on the eval rows, nats per token", xlabel="step")
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 9}
    shares.legend(**beside)
    if len(curves.evaluated):
        losses.legend(**beside)
    else:
        losses.text(0.5, 0.5, "none measured: eval_interval is not set", ha="center", transform=losses.transAxes)
    return figure
