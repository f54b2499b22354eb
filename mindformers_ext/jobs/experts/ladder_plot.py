# SPDX-License-Identifier: Apache-2.0
"""A ladder of losses as a picture: a bar for each way, as long as what it loses to the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindformers_ext.jobs.run.plot import BLUE, GREY, open_pyplot, save_figure


def plot_losses(
    losses: Mapping[str, float],
    dense: str,
    own: str,
    tokens: int,
    path: Path,
    errors: Mapping[str, float] | None = None,
) -> Path:
    """Write the PNG ``path``; losses by way in nats per token, ``dense`` and ``own`` being two of them, and standard
    errors of what each loses to ``dense``, where they are known."""
    ways = sorted(losses.items(), key=lambda item: -item[1])
    figure, axes = open_pyplot().subplots(figsize=(7, 0.5 * len(ways) + 1.2))
    base, spread = losses[dense], errors or {}
    more = [spread.get(name, 0.0) for name, _ in ways]
    lost = [loss - base for _, loss in ways]
    bars = axes.barh([name for name, _ in ways], lost, color=GREY, xerr=more if any(more) else None)
    for bar, (name, loss), error in zip(bars, ways, more, strict=True):
        bar.set_color(BLUE if name == own else GREY)
        place = (max(loss - base + error, 0.0), bar.get_y() + bar.get_height() / 2)
        axes.annotate(f" {loss:.3f}", place, va="center", fontsize=9)
    axes.set(
        title=f"Loss above the dense model's, {tokens} tokens",
        xlabel="nats per token",
    )
    axes.margins(x=0.15)
    return save_figure(figure, path)
