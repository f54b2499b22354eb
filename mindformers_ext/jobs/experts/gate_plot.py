# SPDX-License-Identifier: Apache-2.0
"""How the gates came out, as one picture: recall by epoch, and by layer beside what needs no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.jobs.run.plot import BLUE, GREY, ORANGE, open_pyplot, save_figure


def plot_gates(figures: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the PNG ``path`` from what ``GateFiles.figures`` gives."""
    pyplot = open_pyplot()
    figure, (loss, recall, layers) = pyplot.subplots(1, 3, figsize=(13, 3.6))
    colours = pyplot.get_cmap("cividis")(np.linspace(0, 0.9, max(len(figures), 1)))
    for one, colour in zip(figures, colours, strict=False):
        curve = one["curve"]
        loss.plot(curve["valid_epochs"], curve["valid_loss"], color=colour, marker="." * (len(curve["valid_loss"]) < 2))
        recall.plot(curve["valid_epochs"], curve["valid_acc"], color=colour, marker="." * (len(curve["valid_acc"]) < 2))
    loss.set(title="loss on held-out tokens, a line a layer", xlabel="epoch")
    recall.set(title="recall on held-out tokens, dark: first layers", xlabel="epoch")
    numbers = [one["layer"] for one in figures]
    layers.plot(numbers, [one["recall"] for one in figures], color=BLUE, marker=".", label="fitted gate")
    for name, colour in (("similarity", ORANGE), ("random", GREY)):
        values = [one["baselines"][name]["recall"] for one in figures]
        layers.plot(numbers, values, color=colour, marker=".", label=name)
    layers.set(title="recall by layer", xlabel="layer", ylim=(0, 1))
    layers.locator_params(axis="x", integer=True)
    layers.legend()
    return save_figure(figure, path)
