# SPDX-License-Identifier: Apache-2.0
"""The picture of how the experts share the tokens: means of many steps, and beside them the worst single ones.

A router that collapses for a step does not show in a mean: every part of the picture that is no mean says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_ext.jobs.run.metrics import EDGE, RunMetrics, smoothed
from mindformers_ext.jobs.run.plot import BLUE, GREY, ORANGE, from_zero, open_pyplot, step_axis, window_of

MOST_LABELS = 96  # cells of a heatmap that still get their number written in
COLUMNS = 300  # of the heatmap over steps; each shows the worst of its steps
TICKS = 16


def load_figure(metrics: RunMetrics) -> Any:
    """A figure: each expert's share in the first and last steps and in each layer's worst one; the worst layer step by
    step; the fullest expert; the share dropped."""
    layers, experts = metrics.expert_load.shape[1:]
    count, total = metrics.edge(EDGE), len(metrics.step)
    shares = 100 * metrics.step_shares()
    worst = shares.max(axis=2).argmax(axis=0)  # (L): the record in which an expert has most
    height = min(max(1.8, 0.42 * layers), 9.0)
    figure = open_pyplot().figure(figsize=(min(max(11.0, 1.2 * experts + 2), 16.0), 6.6 + height))
    grid = figure.add_gridspec(3, 1, height_ratios=[height, 2.0, 2.6])
    above, below = grid[0].subgridspec(1, 4, width_ratios=[1, 1, 1, 0.05]), grid[2].subgridspec(1, 2)
    figure.suptitle(f"How {experts} experts share the tokens (balanced: {100 / experts:.1f}% each)")
    steps = "step" if count == 1 else f"{count} steps, mean"
    parts = (
        (f"First {steps}", 100 * metrics.load_share(0, count)),
        (f"Last {steps}", 100 * metrics.load_share(total - count, total)),
        ("Worst single step of each layer", shares[worst, np.arange(layers)]),
    )
    limits = 0.0, max(2 * 100 / experts, *(float(part.max()) for _, part in parts))
    heats = [figure.add_subplot(above[place]) for place in range(3)]
    image = None
    for axes, (title, percent) in zip(heats, parts, strict=True):
        image = _heatmap(axes, percent, limits, title)
    heats[0].set_ylabel("layer")
    for axes in heats[1:]:
        axes.set_yticklabels([])
    shown = heats[2].get_yticks()
    heats[2].set_yticks(shown, [f"step {metrics.step[worst[int(layer)]]:.0f}" for layer in shown], fontsize=8)
    scale = figure.add_subplot(above[3])
    scale.grid(False)
    figure.colorbar(image, cax=scale, label="share of the layer's\nassignments (%)")
    layer = int(shares.max(axis=(0, 2)).argmax())
    _over_steps(figure.add_subplot(grid[1]), metrics, shares[:, layer], layer, limits)
    _fullest_panel(figure.add_subplot(below[0]), metrics, shares, experts)
    _drop_panel(figure.add_subplot(below[1]), metrics, layers)
    return figure


def _heatmap(axes: Any, percent: np.ndarray, limits: tuple[float, float], title: str) -> Any:
    image = axes.imshow(percent, cmap="cividis", aspect="auto", vmin=limits[0], vmax=limits[1])
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.grid(False)
    layers, experts = percent.shape
    axes.set_xticks(range(0, experts, -(-experts // TICKS)))
    axes.set_yticks(range(0, layers, -(-layers // TICKS)))
    if layers * experts <= MOST_LABELS:
        for (layer, expert), value in np.ndenumerate(percent):
            colour = "black" if value > sum(limits) / 2 else "white"
            axes.text(expert, layer, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return image


def worst_columns(shares: np.ndarray, columns: int) -> np.ndarray:
    """Shares (N, E) of one layer in at most ``columns`` rows: of each run of steps the one whose fullest expert has
    most. Returns their numbers."""
    pieces = np.array_split(np.arange(len(shares)), min(columns, len(shares)))
    fullest = shares.max(axis=1)
    return np.array([piece[fullest[piece].argmax()] for piece in pieces])


def _over_steps(axes: Any, metrics: RunMetrics, shares: np.ndarray, layer: int, limits: tuple[float, float]) -> None:
    """Experts by steps of the layer in which one expert had most."""
    chosen = worst_columns(shares, COLUMNS)
    first, last = float(metrics.step[0]), float(metrics.step[-1])
    edges = first - 0.5, last + 0.5, shares.shape[1] - 0.5, -0.5
    axes.imshow(
        shares[chosen].T,
        cmap="cividis",
        aspect="auto",
        interpolation="nearest",
        vmin=limits[0],
        vmax=limits[1],
        extent=edges,
    )
    each = "every step" if len(chosen) == len(shares) else f"the worst of every {len(shares) / len(chosen):.0f} steps"
    axes.set_title(f"Layer {layer}, in which one expert had most: {each}")
    axes.set_ylabel("expert")
    axes.set_yticks(range(0, shares.shape[1], -(-shares.shape[1] // TICKS)))
    axes.grid(False)
    step_axis(axes)


def _fullest_panel(axes: Any, metrics: RunMetrics, shares: np.ndarray, experts: int) -> None:
    """The fullest expert's share: of the worst layer in every step, and the running mean over layers."""
    fullest = shares.max(axis=2)
    axes.plot(metrics.step, fullest.max(axis=1), color=ORANGE, linewidth=0.9, label="worst layer, every step")
    mean = smoothed(fullest.mean(axis=1), window_of(metrics))
    axes.plot(metrics.step, mean, color="black", linewidth=1.8, label="mean over layers, running")
    axes.axhline(100 / experts, color=GREY, linestyle=":", linewidth=1.2, label="balanced")
    axes.set_title("Share of a layer's fullest expert")
    axes.set_ylabel("share (%)")
    from_zero(axes, fullest)
    step_axis(axes)
    axes.legend(fontsize=8)


def _drop_panel(axes: Any, metrics: RunMetrics, layers: int) -> None:
    """The running mean over layers, and the band between the best and the worst layer of every step."""
    percent = 100 * metrics.dropped
    if layers > 1:
        axes.fill_between(
            metrics.step,
            percent.min(axis=1),
            percent.max(axis=1),
            color=BLUE,
            alpha=0.2,
            linewidth=0,
            label="best to worst layer, every step",
        )
    mean = smoothed(percent.mean(axis=1), window_of(metrics))
    axes.plot(metrics.step, mean, color=BLUE, linewidth=1.8, label="mean over layers, running")
    axes.set_title("Assignments dropped for lack of capacity")
    axes.set_ylabel("dropped (%)")
    from_zero(axes, percent)
    step_axis(axes)
    axes.legend(fontsize=8)
