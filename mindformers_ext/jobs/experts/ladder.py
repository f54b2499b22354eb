# SPDX-License-Identifier: Apache-2.0
"""What a mixture is worth before it is trained: its loss on a text beside the dense model's and simpler choices'.

A feed-forward part is a sum over neurons, so each way to choose experts is a weight per token and neuron. The text goes
through the model layer by layer, once for each way; every way sees the layers before it as it has made them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.gating import Gating
from mindformers_ext.jobs.experts.probe import Course, Part, embed, mean_losses
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.surgery.experts.choices import by_answers, by_chance, by_gate, kept_neurons
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import WEIGHTS

Gates = Mapping[int, Mapping[str, np.ndarray]]
Weigh = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Weights (T, E) of the experts from the layer's number, the feed-forward's input (T, D) and its neurons (T, F)."""
POINTS = ("mlp_input", "hidden", "mlp_output")
DENSE, ORACLE, GATE, RANDOM, STATIC = "dense", "oracle", "gate", "random", "static"
MEANING = {
    DENSE: "all neurons",
    ORACLE: "the experts whose neurons answer most, which nobody knows before computing them all",
    GATE: "the experts that the gate chooses",
    STATIC: "as many neurons, the same for every token: those that add most on the text's first half",
    RANDOM: "experts drawn at random for every token",
}


@dataclass(frozen=True)
class Ladder:
    """Mean loss per predicted token of every way, how many tokens, and what the gate did: (layers, E) shares."""

    losses: Mapping[str, float]
    tokens: int
    load: np.ndarray | None = None

    def lines(self) -> list[str]:
        """One line per way, the best first."""
        width = max(map(len, self.losses))
        base = self.losses[DENSE]
        return [
            f"{name:{width}} {loss:.4f}" + ("" if name == DENSE else f" (+{loss - base:.4f})") + f"  {MEANING[name]}"
            for name, loss in sorted(self.losses.items(), key=lambda item: item[1])
        ]


@dataclass
class NeuronSums:
    """A sink of ``probe.forward``: per layer how much each neuron adds, |h| times the norm of its column of down."""

    norms: Callable[[int], np.ndarray]
    nbytes: int = 0
    values: tuple[str, ...] = ("hidden",)
    gradients: tuple[str, ...] = ()
    sums: dict[int, np.ndarray] = field(default_factory=dict)

    def take(
        self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]
    ) -> None:
        """Add a part's tokens."""
        found = np.abs(values["hidden"]).sum(0, dtype=np.float64)
        self.sums[layer] = self.sums.get(layer, 0.0) + found

    def end(self, layer: int) -> None:
        """Weigh the layer's sums."""
        self.sums[layer] *= self.norms(layer)


def static_masks(sums: Mapping[int, np.ndarray], counts: Mapping[int, int]) -> dict[int, np.ndarray]:
    """bool (F) per layer: the ``counts`` neurons that add most."""
    return {layer: kept_neurons(total, counts[layer]) for layer, total in sums.items()}


def oracle(splits: Mapping[int, LayerSplit], chosen: int) -> Weigh:
    """The experts with the largest sums of squares."""
    return lambda layer, x, h: by_answers(h, splits[layer], chosen)


def at_random(experts: int, chosen: int, seed: int) -> Weigh:
    """Experts drawn anew for every token."""
    generator = np.random.default_rng(seed)
    return lambda layer, x, h: by_chance(generator, len(x), experts, chosen)


def gated(gates: Gates, gating: Gating) -> Weigh:
    """As the mixture's own gate decides and weighs."""

    def weigh(layer: int, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        own = {name: gates[layer][name] for name in WEIGHTS[gating.network]}
        factor = gating.factor_of(layer)
        return by_gate(x, own, gating.chosen, softmax=gating.softmax, multiply=gating.multiply, factor=factor)

    return weigh


@dataclass(frozen=True)
class Way:
    """One way through all layers: ``weigh`` experts, or keep ``fixed`` neurons, or all of them."""

    name: str
    weigh: Weigh | None = None
    fixed: Mapping[int, np.ndarray] | None = None


def climb(course: Course, ways: Sequence[Way], splits: Mapping[int, LayerSplit], folder: Path) -> Ladder:
    """The loss of every way on the course's rows. ``folder``: made for what enters the layers, and removed.

    A layer's weights are in memory once, and its input and neurons of the tokens that are computed at once.
    """
    states = [States(folder / way.name, course.length, course.model.spec.hidden_size, way.name, False) for way in ways]
    loads: list[np.ndarray] = []
    try:
        return Ladder(*_climbed(course, ways, splits, states, loads), load=np.array(loads) if loads else None)
    finally:
        for state in states:
            state.remove()
        folder.rmdir()


def _climbed(
    course: Course,
    ways: Sequence[Way],
    splits: Mapping[int, LayerSplit],
    states: Sequence[States],
    loads: list[np.ndarray],
) -> tuple[dict[str, float], int]:
    layers = course.model.spec.num_hidden_layers
    probe = course.open()
    for state in states:
        embed(course, state)
    with tqdm(total=layers * len(ways), desc="measuring", unit="layer", disable=course.quiet or None) as bar:
        for layer in range(layers):
            probe.fill(layer, course.model.layer(layer))
            down = course.model.matrix("down_proj", layer)
            for way, state in zip(ways, states, strict=True):
                load = _layer(course, probe, way, splits, layer, state, down)
                if way.name == GATE:
                    loads.append(load / max(load.sum(), 1.0))
                bar.update()
    losses = mean_losses(course, probe, states, layers)
    return {way.name: loss for way, loss in zip(ways, losses, strict=True)}, course.rows.predicted


def _layer(
    course: Course,
    probe: LayerProbe,
    way: Way,
    splits: Mapping[int, LayerSplit],
    layer: int,
    state: States,
    down: np.ndarray,
) -> np.ndarray:
    """Take every row through one layer; how many tokens chose each expert."""
    mask, passed = splits[layer].mask().astype(np.float32), splits[layer].passed()
    load = np.zeros(mask.shape[1])
    came, leaves = state.input_of(layer), state.input_of(layer + 1)
    for _, rows, length in course.parts():
        y, taps = probe.forward(came.read(rows, length), () if way.name == DENSE else POINTS)
        if way.weigh or way.fixed:
            hidden = taps["hidden"]
            if way.weigh:
                weights = way.weigh(layer, taps["mlp_input"], hidden)
                inside, _ = course.kept(rows, length)
                load += (weights[inside] != 0).sum(0)
                hidden = hidden * (weights @ mask.T + passed)
            elif way.fixed:
                hidden = hidden * way.fixed[layer]
            y = y + (hidden @ down.T - taps["mlp_output"]).reshape(y.shape)
        leaves.write(rows, y)
    came.close()
    leaves.close()
    return load
