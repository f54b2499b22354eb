# SPDX-License-Identifier: Apache-2.0
"""One page about a mixture: expert sizes, overlap, what the gates find, load per layer, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.formats.atomic import fresh_folder, refuse_existing
from mindformers_ext.jobs.experts.gate_plot import plot_gates
from mindformers_ext.jobs.experts.ladder import DENSE, GATE, MEANING, STATIC, Ladder
from mindformers_ext.jobs.experts.ladder_plot import plot_losses
from mindformers_ext.jobs.run import html
from mindformers_ext.jobs.run.plot import open_pyplot, save_figure
from mindformers_ext.surgery.experts.gradient import overlap
from mindformers_ext.surgery.experts.split import LayerSplit


@dataclass(frozen=True, kw_only=True)
class MixtureFacts:
    """What is known of a mixture. ``gates``: figures of ``GateFiles.figures``; ``ladder``: None where not measured."""

    model: str
    splits: Mapping[int, LayerSplit]
    chosen: int
    gates: Sequence[Mapping[str, Any]] = ()
    ladder: Ladder | None = None


def check_place(folder: Path, overwrite: bool) -> None:
    """Refuse (``UserError``) a folder that stands there already, before anything is measured."""
    refuse_existing(folder, overwrite)


def write_report(facts: MixtureFacts, folder: Path, overwrite: bool = False) -> Path:
    """Write ``report.html``, its pictures as PNG and its figures as ``report.json`` into ``folder``, whole or not."""
    with fresh_folder(folder, overwrite) as partial:
        pictures = []
        if facts.gates:
            pictures.append((plot_gates(facts.gates, partial / "gates.png"), "What the gates find"))
        if facts.ladder is not None:
            path = plot_losses(facts.ladder.losses, DENSE, GATE, facts.ladder.tokens, partial / "ladder.png")
            pictures.append((path, "Loss of each way to choose neurons"))
            if facts.ladder.load is not None:
                pictures.append((_plot_load(facts.ladder.load, partial / "load.png"), "Load of the experts"))
        (partial / "report.html").write_text(_page(facts, pictures), encoding="utf-8")
        (partial / "report.json").write_text(json.dumps(figures(facts), indent=1) + "\n", encoding="utf-8")
    return folder / "report.html"


def figures(facts: MixtureFacts) -> dict[str, Any]:
    """All that the page says, as plain values."""
    layers = {
        str(layer): {
            "sizes": list(split.sizes),
            "residual_sizes": list(split.residual_sizes),
            "covered": covered(split),
            "overlap": mean_overlap(split),
        }
        for layer, split in facts.splits.items()
    }
    result: dict[str, Any] = {"model": facts.model, "chosen": facts.chosen, "layers": layers}
    if facts.gates:
        result["gates"] = {
            str(one["layer"]): {name: one[name] for name in ("recall", "captured", "oracle", "load_cv")}
            for one in facts.gates
        }
    if facts.ladder is not None:
        result |= {"losses": dict(facts.ladder.losses), "tokens": facts.ladder.tokens}
        if facts.ladder.load is not None:
            result["load"] = facts.ladder.load.tolist()
    return result


def covered(split: LayerSplit) -> float:
    """Share of the neurons that some expert holds."""
    return float(np.unique(np.concatenate((*split.experts, *split.residual))).size / split.width)


def mean_overlap(split: LayerSplit) -> float:
    """Mean of shared / all neurons over the pairs of routed experts; 0 for a partition and for one expert."""
    count = len(split.experts)
    _, rate = overlap(LayerSplit(split.width, split.experts))
    pairs = np.triu_indices(count, 1)
    return float(rate[pairs].mean()) if count > 1 else 0.0


def routing_pays(ladder: Ladder) -> bool:
    """Whether the gate's choice is better than a static cut of the same size; True where there is no gate."""
    return GATE not in ladder.losses or ladder.losses[GATE] < ladder.losses[STATIC]


def verdict(ladder: Ladder) -> str:
    """Whether routing pays here, in a sentence."""
    losses = ladder.losses
    if GATE not in losses:
        return f"No gate was given; a static cut of the same size loses {losses[STATIC] - losses[DENSE]:.4f} to dense."
    gate, static = losses[GATE], losses[STATIC]
    if not routing_pays(ladder):
        return (
            f"A static cut of the same number of neurons is no worse than the gate ({static:.4f} against {gate:.4f}): "
            "routing earns nothing here before it is trained on."
        )
    return (
        f"The gate's choice loses {gate - losses[DENSE]:.4f} to the dense model, a static cut of the same size "
        f"{static - losses[DENSE]:.4f}."
    )


def _page(facts: MixtureFacts, pictures: Sequence[tuple[Path, str]]) -> str:
    first = facts.splits[0]
    body = [
        f"<h1>Mixture made of {escape(facts.model)}</h1>",
        f"<p>{len(facts.splits)} layers, {len(first.experts)} experts, {facts.chosen} chosen for every token"
        + (f", {len(first.residual)} passed by all" if first.residual else "")
        + "</p>",
    ]
    if facts.ladder is not None:
        body += [
            f'<p class="answer{"" if routing_pays(facts.ladder) else " bad"}">{escape(verdict(facts.ladder))}</p>',
            f"<h2>Loss per token over {facts.ladder.tokens} tokens</h2>",
            _ladder_table(facts.ladder),
        ]
    body += [f"<h2>{escape(title)}</h2>{html.picture(path, title)}" for path, title in pictures]
    body += ["<h2>Layers</h2>", _layer_table(facts)]
    return html.document(f"Mixture of {facts.model}", "\n".join(body))


def _ladder_table(ladder: Ladder) -> str:
    base = ladder.losses[DENSE]
    rows = (
        (html.text(name), html.number(f"{loss:.4f}"), html.number(f"{loss - base:+.4f}"), html.text(MEANING[name]))
        for name, loss in sorted(ladder.losses.items(), key=lambda item: item[1])
    )
    return html.table(("way", "loss", "to dense", "neurons"), rows)


def _layer_table(facts: MixtureFacts) -> str:
    gates = {one["layer"]: one for one in facts.gates}
    head = ["layer", "smallest expert", "largest expert", "neurons held", "overlap"]
    head += ["recall", "captured", "at best", "load CV"] if gates else []
    rows = []
    for layer, split in sorted(facts.splits.items()):
        sizes = split.sizes
        row = [layer, min(sizes), max(sizes), f"{100 * covered(split):.1f}%", f"{mean_overlap(split):.3f}"]
        if gates:
            one = gates.get(layer)
            row += [f"{one[name]:.3f}" if one else "-" for name in ("recall", "captured", "oracle", "load_cv")]
        rows.append([html.number(value) for value in row])
    return html.table(head, rows)


def _plot_load(load: np.ndarray, path: Path) -> Path:
    """Share of the assignments of every layer's experts."""
    layers, experts = load.shape
    figure, axes = open_pyplot().subplots(figsize=(min(4 + 0.4 * experts, 12), min(1.6 + 0.22 * layers, 10)))
    image = axes.imshow(100 * load, cmap="cividis", aspect="auto", vmin=0, vmax=max(200 / experts, 100 * load.max()))
    axes.grid(False)
    axes.set(title=f"Share of each expert (balanced: {100 / experts:.1f}%)", xlabel="expert", ylabel="layer")
    figure.colorbar(image, label="share of the layer's assignments (%)")
    return save_figure(figure, path)
