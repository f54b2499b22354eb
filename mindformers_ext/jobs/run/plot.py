# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run: the loss curve and how the experts share the tokens.

Colours are Okabe and Ito's set and the map "cividis": both can be told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.run.metrics import EDGE, RunMetrics, read_metrics, smoothed

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
LINES = ("-", "--", "-.", ":")
SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}
MOST_LABELS = 96  # cells of a heatmap that still get their number written in


def plot_run(run_folder: Path) -> list[Path]:
    """Write loss.png and, for a model with experts, expert_load.png into ``run_folder``; returns the files."""
    metrics = read_metrics(run_folder)
    pictures = [save_figure(_loss_figure(metrics), run_folder / "loss.png")]
    if metrics.has_experts:
        pictures.append(save_figure(_load_figure(metrics), run_folder / "expert_load.png"))
    return pictures


def open_pyplot() -> Any:
    """matplotlib.pyplot with our settings, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update(SETTINGS)
    return pyplot


def save_figure(figure: Any, path: Path) -> Path:
    """Write the PNG ``path`` whole, and forget the figure."""
    with fresh_file(path, overwrite=True) as beside:
        figure.savefig(beside, format="png")
    open_pyplot().close(figure)
    return path


def _window(metrics: RunMetrics) -> int:
    return max(1, len(metrics.step) // 25)


def _noisy_line(axes: Any, metrics: RunMetrics, values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """Every step pale, the running mean strong."""
    axes.plot(metrics.step, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(metrics.step, smoothed(values, _window(metrics)), style, color=colour, linewidth=1.8, label=label)


def _loss_figure(metrics: RunMetrics) -> Any:
    pyplot = open_pyplot()
    has_rate = bool(np.isfinite(metrics.learning_rate).any())
    heights = [3.2, 1.2, 0.8] if has_rate else [3.2, 1.2]
    figure, panels = pyplot.subplots(
        len(heights), 1, figsize=(8.5, 6.6), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    count, (_, _, ratio) = metrics.edge(EDGE), metrics.loss_ratio(EDGE)
    figure.suptitle(
        f"Training loss over {len(metrics.step)} steps: mean of the last {count} steps is "
        f"{ratio:.2f} x the first {count}"
    )
    _noisy_line(panels[0], metrics, metrics.loss, BLUE, "total = LM + aux")
    _noisy_line(panels[0], metrics, metrics.lm_loss, ORANGE, "language modelling (LM)", "--")
    panels[0].set_ylabel("loss (nats per token)")
    window = _window(metrics)
    panels[0].legend(loc="upper right", title=f"thick: mean over {window} steps" if window > 1 else None)
    _noisy_line(panels[1], metrics, metrics.aux_loss, GREEN, "aux")
    panels[1].set_ylabel("aux loss,\nall layers")
    if has_rate:
        panels[2].plot(metrics.step, metrics.learning_rate, color=GREY, linewidth=1.4)
        panels[2].set_ylabel("learning\nrate")
        panels[2].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
        _from_zero(panels[2], metrics.learning_rate)
    _step_axis(panels[-1])
    figure.align_ylabels(panels)
    return figure


def _load_figure(metrics: RunMetrics) -> Any:
    pyplot = open_pyplot()
    layers, experts = metrics.expert_load.shape[1:]
    count = metrics.edge(EDGE)
    shares = metrics.load_share(0, count), metrics.load_share(len(metrics.step) - count, len(metrics.step))
    height = min(max(1.8, 0.42 * layers), 9.0)
    figure = pyplot.figure(figsize=(min(max(9.0, 0.9 * experts + 2), 15.0), 4.2 + height))
    grid = figure.add_gridspec(2, 1, height_ratios=[height, 2.4])
    above, below = grid[0].subgridspec(1, 3, width_ratios=[1, 1, 0.05]), grid[1].subgridspec(1, 2)
    figure.suptitle(f"How {experts} experts share the tokens (balanced: {100 / experts:.1f}% each)")
    heats = [figure.add_subplot(above[side]) for side in (0, 1)]
    low, high = 100 * min(s.min() for s in shares), 100 * max(s.max() for s in shares)
    image = None
    steps = "step" if count == 1 else f"{count} steps"
    for axes, share, when in zip(heats, shares, (f"First {steps}", f"Last {steps}"), strict=True):
        image = _heatmap(axes, 100 * share, (low, high), when)
    heats[0].set_ylabel("layer")
    scale = figure.add_subplot(above[2])
    scale.grid(False)
    figure.colorbar(image, cax=scale, label="share of the layer's\nassignments (%)")
    _cv_panel(figure.add_subplot(below[0]), metrics, layers)
    _drop_panel(figure.add_subplot(below[1]), metrics, layers)
    return figure


def _heatmap(axes: Any, percent: np.ndarray, limits: tuple[float, float], title: str) -> Any:
    image = axes.imshow(percent, cmap="cividis", aspect="auto", vmin=limits[0], vmax=limits[1])
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.grid(False)
    layers, experts = percent.shape
    axes.set_xticks(range(0, experts, -(-experts // 16)))
    axes.set_yticks(range(0, layers, -(-layers // 16)))
    if layers * experts <= MOST_LABELS:
        middle = sum(limits) / 2
        for layer in range(layers):
            for expert in range(experts):
                value = percent[layer, expert]
                colour = "black" if value > middle else "white"
                axes.text(expert, layer, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return image


def _cv_panel(axes: Any, metrics: RunMetrics, layers: int) -> None:
    """One line per layer where few, and their mean."""
    cv = smoothed(metrics.load_cv(), _window(metrics))
    if 1 < layers <= 8:
        colours = (BLUE, ORANGE, GREEN, PINK)
        for layer in range(layers):
            axes.plot(
                metrics.step,
                cv[:, layer],
                LINES[layer // 4],
                color=colours[layer % 4],
                linewidth=1.2,
                label=f"layer {layer}",
            )
    axes.plot(metrics.step, cv.mean(axis=1), color="black", linewidth=2.0, label="mean over layers")
    axes.set_title("Imbalance of the load (0 = even)")
    axes.set_ylabel("standard deviation / mean")
    _from_zero(axes, cv)
    _step_axis(axes)
    axes.legend(ncols=2, fontsize=8)


def _drop_panel(axes: Any, metrics: RunMetrics, layers: int) -> None:
    """Mean over layers, and the band between the best and the worst layer."""
    percent = 100 * smoothed(metrics.dropped, _window(metrics))
    if layers > 1:
        axes.fill_between(
            metrics.step,
            percent.min(axis=1),
            percent.max(axis=1),
            color=BLUE,
            alpha=0.2,
            linewidth=0,
            label="best to worst layer",
        )
    axes.plot(metrics.step, percent.mean(axis=1), color=BLUE, linewidth=1.8, label="mean over layers")
    axes.set_title("Assignments dropped for lack of capacity")
    axes.set_ylabel("dropped (%)")
    _from_zero(axes, percent)
    _step_axis(axes)
    axes.legend(fontsize=8)


def _from_zero(axes: Any, values: np.ndarray) -> None:
    """The axis starts at 0 and leaves room above the highest value."""
    highest = float(np.nanmax(values))
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1.0)


def _step_axis(axes: Any) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
