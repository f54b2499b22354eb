# SPDX-License-Identifier: Apache-2.0
"""Recipes that carve a layer: what every token passes, how the other neurons are grouped, the router, the refit.

EMP ("expectation by predicted choice", ours), CMoE (arXiv:2502.04416), ExpertWeaver (arXiv:2602.15521), a random split,
and static cuts of the same number of neurons, which no mixture may lose to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np
import torch

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import THRESHOLD
from mindformers_ext.surgery.experts.carve.carved import CarvedLayer, file_rows, weight_error
from mindformers_ext.surgery.experts.carve.choose import (
    Chooser,
    Linear,
    Oracle,
    Representative,
    Threshold,
    output_lengths,
)
from mindformers_ext.surgery.experts.carve.grouping import InputFit, by_prediction
from mindformers_ext.surgery.experts.carve.markers import Markers
from mindformers_ext.surgery.experts.carve.refit import refit_sums
from mindformers_ext.surgery.experts.carve.sample import LayerSample, top
from mindformers_ext.surgery.experts.cluster import balanced_clusters
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES, NONE
from mindformers_ext.surgery.ridge import Floats

RIDGE, REPRESENTATIVE, MEAN_GATE, ORACLE = "ridge", "representative", "mean_gate", "oracle"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``experts``: N groups of neurons of one size, of which ``shared`` are always computed and ``active`` others are
    chosen. ``method``: a key of ``METHODS`` or ``STATIC``; of the latter ``bias`` adds what is cut on average."""

    method: str
    experts: int
    shared: int
    active: int
    router: str = RIDGE
    refit: str = LEAST_SQUARES
    bias: bool = False
    seed: int = 0

    def at(self, layer: int) -> Recipe:
        """That of one layer."""
        return self


@dataclass(frozen=True, kw_only=True)
class LayeredRecipe(Recipe):
    """``by_layer``: how many are always computed in each layer; ``shared`` + ``active`` is the sum in all of them."""

    by_layer: tuple[int, ...]

    def at(self, layer: int) -> Recipe:
        """That of one layer."""
        words = {item.name: getattr(self, item.name) for item in fields(Recipe)}
        shared = self.by_layer[layer]
        return Recipe(**words | {"shared": shared, "active": self.shared + self.active - shared})


class Layer:
    """What the steps of a recipe have in common; ``size``: neurons of a group, ``number``: the layer's."""

    def __init__(self, sample: LayerSample, recipe: Recipe, number: int) -> None:
        self.sample, self.recipe, self.number = sample, recipe, number
        self.size = sample.hidden.shape[1] // recipe.experts

    @cached_property
    def fit(self) -> InputFit:
        """The damped least squares on the layer's inputs."""
        return InputFit.of(self.sample.x)

    @cached_property
    def markers(self) -> Markers:
        """The layer's markers."""
        return Markers(self.sample)

    def forget(self) -> None:
        """Let go of what was made once: a refit needs the memory."""
        self.__dict__.pop("fit", None)
        self.__dict__.pop("markers", None)

    def draws(self) -> np.random.Generator:
        """Random numbers of this layer's own."""
        return np.random.default_rng((self.recipe.seed, self.number))


def gate_answers(sample: LayerSample) -> tuple[np.ndarray, Floats]:
    """Means of silu(g x) over the tokens of each row of text, float32 (F, rows); of its size over all, (F)."""
    texts, places = np.unique(sample.rows, return_inverse=True)
    means, sizes = np.zeros((len(texts), len(sample.gate))), np.zeros(len(sample.gate))
    for part in sample.parts():
        answers = torch.nn.functional.silu(torch.from_numpy(sample.x[part] @ sample.gate.T)).numpy()
        np.add.at(means, places[part], answers)
        sizes += np.abs(answers).sum(0, dtype=np.float64)
    means /= np.bincount(places)[:, None]
    return np.ascontiguousarray(means.T, np.float32), sizes


def _emp(layer: Layer, rest: np.ndarray, groups: int) -> np.ndarray:
    first = layer.markers.groups(rest, groups)
    return by_prediction(layer.sample, layer.fit, rest, first, layer.recipe.active) if groups > 1 else first


def _weaver(layer: Layer, rest: np.ndarray, groups: int) -> np.ndarray:
    means, _ = gate_answers(layer.sample)
    return balanced_clusters(means[rest], groups, seed=(layer.recipe.seed, layer.number)).labels


def _random(layer: Layer, rest: np.ndarray, groups: int) -> np.ndarray:
    return layer.draws().permutation(np.arange(len(rest)) % groups)


def _activation(sample: LayerSample) -> Floats:
    sizes = sum((np.abs(sample.hidden[part]).sum(0, dtype=np.float64) for part in sample.parts()), start=np.zeros(1))
    return np.asarray(sizes * np.sqrt(sample.column_squares()))


def _wifv(sample: LayerSample) -> Floats:
    return sample.moments()[1] * sample.column_squares()


@dataclass(frozen=True)
class Method:
    """``shared``: neurons by how much they should be computed for every token (F). ``grouped``: groups of the others
    (from the layer, their ids, how many groups). ``router``, ``refit``: where nobody says."""

    shared: Callable[[Layer], Floats]
    grouped: Callable[[Layer, np.ndarray, int], np.ndarray]
    router: str
    refit: str


METHODS: Mapping[str, Method] = {
    "emp": Method(lambda layer: layer.sample.energies(), _emp, RIDGE, LEAST_SQUARES),
    "cmoe": Method(
        lambda layer: layer.markers.rates(),
        lambda layer, rest, groups: layer.markers.groups(rest, groups),
        REPRESENTATIVE,
        NONE,
    ),
    "expertweaver": Method(lambda layer: gate_answers(layer.sample)[1], _weaver, MEAN_GATE, NONE),
    "random": Method(lambda layer: layer.sample.energies(), _random, RIDGE, LEAST_SQUARES),
}
# what a static cut keeps: by mean size of what a neuron adds, by FLAP's measure (arXiv:2312.11983, equation 5), and by
# its squares as shares of the hidden state
STATIC: Mapping[str, Callable[[LayerSample], Floats]] = {
    "activation": _activation,
    "wifv": _wifv,
    "rel": LayerSample.energies,
}
ROUTERS: Mapping[str, Callable[[Layer, Sequence[np.ndarray]], Chooser]] = {
    RIDGE: lambda layer, experts: _linear(layer, _ridge_rows(layer, experts)),
    THRESHOLD: lambda layer, experts: Threshold.fitted(
        layer.sample.x, _ridge_rows(layer, experts), layer.recipe.active
    ),
    REPRESENTATIVE: lambda layer, experts: Representative.of(
        layer.sample.gate, layer.sample.up, layer.markers.representatives(tuple(experts)), layer.recipe.active
    ),
    MEAN_GATE: lambda layer, experts: _linear(
        layer, np.stack([layer.sample.gate[ids].mean(0, dtype=np.float64) for ids in experts])
    ),
    ORACLE: lambda layer, experts: Oracle(experts, layer.sample.down, layer.recipe.active),
}


def _ridge_rows(layer: Layer, experts: Sequence[np.ndarray]) -> Floats:
    sample = layer.sample
    lengths = output_lengths(sample.hidden, sample.down, experts)
    lengths *= np.sqrt(sample.weights)[:, None].astype(np.float32)
    return layer.fit.rows(lengths)


def _linear(layer: Layer, rows: np.ndarray) -> Linear:
    return Linear(file_rows(rows, layer.sample.x), layer.recipe.active)


def carve_layer(sample: LayerSample, recipe: Recipe, number: int) -> CarvedLayer:
    """Carve one layer.

    Raises:
        UserError: the layer's numbers are not finite.
    """
    if not all(np.isfinite(array).all() for array in (sample.x, sample.hidden, sample.weights, sample.down)):
        raise UserError(f"layer {number} has values that are not finite: the model or the text is damaged")
    layer = Layer(sample, recipe.at(number), number)
    return _static(layer) if recipe.method in STATIC else _mixture(layer)


def _mixture(layer: Layer) -> CarvedLayer:
    sample, recipe, method = layer.sample, layer.recipe, METHODS[layer.recipe.method]
    width, groups = sample.hidden.shape[1], recipe.experts - recipe.shared
    always = top(method.shared(layer), recipe.shared * layer.size)
    rest = np.setdiff1d(np.arange(width), always)
    labels = method.grouped(layer, rest, groups)
    experts = tuple(rest[labels == place] for place in range(groups))
    split = LayerSplit(width, experts, (always,) if len(always) else ())
    chooser = ROUTERS[recipe.router](layer, experts)
    chosen = chooser.choose(sample.x, sample.hidden)
    figures = {"load_largest": float(chosen.mean(0).max() * groups / recipe.active)}
    if isinstance(chooser, Linear):
        error = weight_error(sample.x, chooser.rows, recipe.active)
        figures |= {f"weight_{name}": value for name, value in asdict(error).items()}
    layer.forget()
    down, more = _refitted(layer, always, experts, chosen)
    return CarvedLayer(split, chooser, down, None, figures | more)


def _static(layer: Layer) -> CarvedLayer:
    sample, recipe = layer.sample, layer.recipe
    width = sample.hidden.shape[1]
    kept = top(STATIC[recipe.method](sample), (recipe.shared + recipe.active) * layer.size)
    gone = np.setdiff1d(np.arange(width), kept)
    if not len(gone):
        raise UserError("all neurons are active: nothing is cut")
    bias = None
    if recipe.bias:
        bias = (sample.down[:, gone].astype(np.float64) @ sample.moments()[0][gone]).astype(np.float32)
    down, figures = _refitted(layer, kept, (gone,), np.zeros((len(sample.x), 1), bool))
    return CarvedLayer(LayerSplit(width, (gone,), (kept,)), None, down, bias, figures)


def _refitted(
    layer: Layer, always: np.ndarray, experts: Sequence[np.ndarray], chosen: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """The output matrix, and the weighted square error per token without and with the refit."""
    if layer.recipe.refit == NONE:
        return layer.sample.down, {}
    found = refit_sums(layer.sample, always, experts, chosen).solve(layer.sample.down)
    return found.down, {"error_plain": found.before, "error_refitted": found.after}
