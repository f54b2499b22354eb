# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run: the loss curve; how the experts share the tokens is drawn by ``jobs.run.plot_load``.

Colours are Okabe and Ito's set and the map "cividis": both can be told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.run.metrics import EDGE, RunMetrics, read_metrics, smoothed

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
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


def plot_run(run_folder: Path) -> list[Path]:
    """Write loss.png and, for a model with experts, expert_load.png into ``run_folder``; returns the files."""
    from mindformers_ext.jobs.run.plot_load import load_figure

    metrics = read_metrics(run_folder)
    pictures = [save_figure(_loss_figure(metrics), run_folder / "loss.png")]
    if metrics.has_experts:
        pictures.append(save_figure(load_figure(metrics), run_folder / "expert_load.png"))
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


def window_of(metrics: RunMetrics) -> int:
    """Steps that a running mean goes over."""
    return max(1, len(metrics.step) // 25)


def _noisy_line(axes: Any, metrics: RunMetrics, values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """Every step pale, the running mean strong."""
    axes.plot(metrics.step, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(metrics.step, smoothed(values, window_of(metrics)), style, color=colour, linewidth=1.8, label=label)


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
    window = window_of(metrics)
    panels[0].legend(loc="upper right", title=f"thick: mean over {window} steps" if window > 1 else None)
    _noisy_line(panels[1], metrics, metrics.aux_loss, GREEN, "aux")
    panels[1].set_ylabel("aux loss,\nall layers")
    if has_rate:
        panels[2].plot(metrics.step, metrics.learning_rate, color=GREY, linewidth=1.4)
        panels[2].set_ylabel("learning\nrate")
        panels[2].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
        from_zero(panels[2], metrics.learning_rate)
    step_axis(panels[-1])
    figure.align_ylabels(panels)
    return figure


def from_zero(axes: Any, values: np.ndarray) -> None:
    """The axis starts at 0 and leaves room above the highest value."""
    highest = float(np.nanmax(values))
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1.0)


def step_axis(axes: Any) -> None:
    """The axis counts training steps."""
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
