# SPDX-License-Identifier: Apache-2.0
"""Output matrices of a pruned model, changed so that they make up for what was cut: least squares, or a bias.

Least squares goes layer by layer on what the pruned layers before it leave, and aims at what the layer itself would
give with all its heads and neurons (measured to be better than the dense model's state).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.jobs.engine.protocols import LayerProbe
from mindformers_ext.jobs.experts.probe import Course, check_needs, embed, needs, pass_on
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.jobs.prune.cut import Change
from mindformers_ext.jobs.prune.one_shot.importance_file import Importance
from mindformers_ext.jobs.prune.one_shot.pruned import pruned_model
from mindformers_ext.jobs.prune.source import DenseSource
from mindformers_ext.surgery.prune.cut import FullMasks, full_masks
from mindformers_ext.surgery.prune.least_squares import add_moments, fitted, relative_error

OUTER = ("hidden", "layer")  # what is cut before a layer is fitted
LINEAR = "model.layers.{}.{}.weight"


@dataclass(frozen=True)
class Output:
    """An output matrix: Hugging Face's name in a layer, MindSpore's, and the point and letter of its input."""

    name: str
    own: str
    point: str
    letter: str
    modules: tuple[str, ...]


OUTPUTS = (
    Output("self_attn.o_proj", "attention.wo.weight", "context", "HP", ("head", "kv_head", "q_in_group")),
    Output("mlp.down_proj", "feed_forward.w2.weight", "hidden", "F", ("intermediate",)),
)


@dataclass(frozen=True)
class Fit:
    """How far one matrix's output is from what it was, as a share of it: after the plain cut, and fitted."""

    layer: int
    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Fitter:
    """Fits the output matrices of one pruned model. ``course``: of the dense model; ``folder``: a scratch folder."""

    course: Course
    dense: DenseSource
    full: FullMasks
    values: Mapping[str, np.ndarray]
    folder: Path

    def fit(self) -> tuple[dict[str, Change], list[Fit]]:
        """The changes by the pruned model's names, and what they bring."""
        outputs = [output for output in OUTPUTS if set(output.modules) & set(self.values)]
        outer = {name: value for name, value in self.values.items() if name in OUTER}
        masks = full_masks(outer, self.full.shape, self.full.tied)
        model = pruned_model(self.dense, masks, {}, self.course.model.folder)
        course = replace(self.course, model=model)
        spec = model.spec
        check_needs(needs(course, _Moments(outputs, self.full.shape), spec.num_hidden_layers, False), self.folder)
        states = States(self.folder / "fit", course.length, spec.hidden_size, "fit", keep=False)
        try:
            return self._run(course, outputs, states)
        finally:
            states.remove()

    def _run(self, course: Course, outputs: list[Output], states: States) -> tuple[dict[str, Change], list[Fit]]:
        changes: dict[str, Change] = {}
        fits: list[Fit] = []
        probe = course.open()
        embed(course, states)
        numbers = self.full.kept_layers
        with tqdm(total=len(numbers), desc="fitting", unit="layer", disable=course.quiet or None) as bar:
            for place, layer in enumerate(numbers):
                done: dict[str, np.ndarray] = {}
                probe.fill(place, course.model.layer(place))
                for output in outputs:
                    wide, fit = self._fitted(course, probe, output, place, layer, states, changes)
                    fits.append(fit)
                    done[output.own] = wide
                    weights = ((name, done.get(name, array)) for name, array in course.model.layer(place))
                    probe.fill(place, weights)
                pass_on(course, probe, place, states, states)
                bar.update()
        return changes, fits

    def _fitted(
        self,
        course: Course,
        probe: LayerProbe,
        output: Output,
        place: int,
        layer: int,
        states: States,
        changes: dict[str, Change],
    ) -> tuple[np.ndarray, Fit]:
        """The matrix with zeros where its input is cut."""
        name = LINEAR.format(place, output.name)
        weight = np.asarray(course.model.reader.read(name), np.float32)
        moments = np.zeros((weight.shape[1], weight.shape[1]))
        came = states.input_of(place)
        for _, rows, length in course.parts():
            y, taps = probe.forward(came.read(rows, length), (output.point,))
            inside, _ = course.kept(rows, length)
            add_moments(moments, taps[output.point][inside], y.reshape(-1, y.shape[-1])[inside])
        came.close()
        kept = self.full.indices(output.letter, layer)
        if kept is None:
            raise ValueError(f"{output.letter} is no axis of a layer")
        chosen = fitted(moments, weight, kept).astype(np.float32)
        fit = Fit(
            layer,
            output.name,
            relative_error(moments, weight, kept, weight[:, kept]),
            relative_error(moments, weight, kept, chosen),
        )
        changes[name] = _on_disk(self.folder / f"{place}.{output.name}.npy", chosen)
        wide = np.zeros_like(weight)
        wide[:, kept] = chosen
        return wide, fit


class _Moments:
    """What a fit holds beside a layer, as a sink tells it."""

    gradients: tuple[str, ...] = ()

    def __init__(self, outputs: list[Output], shape: ModelShape) -> None:
        widths = {"HP": shape.num_attention_heads * shape.head_dim, "F": shape.intermediate_size}
        widest = max((widths[output.letter] for output in outputs), default=0)
        self.values: tuple[str, ...] = tuple(output.point for output in outputs)
        self.nbytes = 8 * (4 * widest * widest + 3 * widest * shape.hidden_size)

    def take(self, layer: int, part: object, values: object, gradients: object) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""


def _on_disk(path: Path, array: np.ndarray) -> Change:
    """A change that waits in a file until it is read."""
    np.save(path, array)
    return Change(array.shape, lambda: np.load(path, allow_pickle=False))


def biases(
    dense: DenseSource, full: FullMasks, values: Mapping[str, np.ndarray], importance: Importance
) -> dict[str, Change]:
    """What the units that are cut gave on average, as biases of the output matrices (FLAP, arXiv:2312.11983, equation
    6), with zeros for the biases that config.json's switch brings along."""
    changes: dict[str, Change] = {}
    model, hidden = dense.model, full.indices("D", None)
    for place, layer in enumerate(full.kept_layers):
        for output, mean, switch, beside in (
            (OUTPUTS[0], "context_mean", model.out_bias, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (OUTPUTS[1], "neuron_mean", model.mlp_bias, ("mlp.gate_proj", "mlp.up_proj")),
        ):
            if not set(output.modules) & set(values):
                continue
            make = _bias(dense, layer, output, importance.statistics[mean][layer], full, switch)
            size = full.shape.hidden_size if hidden is None else len(hidden)
            changes[f"model.layers.{place}.{output.name}.bias"] = Change((size,), make)
            for name in () if switch else beside:
                rows = _rows(full, name, layer)
                changes[f"model.layers.{place}.{name}.bias"] = Change((rows,), partial(np.zeros, rows, np.float32))
    return changes


def _rows(full: FullMasks, name: str, layer: int) -> int:
    letter = {"q_proj": "HP", "k_proj": "NP", "v_proj": "NP"}.get(name.rpartition(".")[2], "F")
    kept = full.indices(letter, layer)
    return 0 if kept is None else len(kept)


def _bias(
    dense: DenseSource, layer: int, output: Output, mean: np.ndarray, full: FullMasks, has: bool
) -> Callable[[], np.ndarray]:
    kept, hidden = full.indices(output.letter, layer), full.indices("D", None)

    def make() -> np.ndarray:
        weight = np.asarray(dense.reader.read(LINEAR.format(layer, output.name)), np.float64)
        gone = np.ones(weight.shape[1], bool)
        gone[kept] = False
        total = weight[:, gone] @ mean[gone]
        if has:
            total = total + np.asarray(dense.reader.read(f"model.layers.{layer}.{output.name}.bias"), np.float64)
        return np.asarray(total if hidden is None else total[hidden]).astype(np.float32)

    return make
