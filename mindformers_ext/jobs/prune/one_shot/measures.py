# SPDX-License-Identifier: Apache-2.0
"""What a pass of the probe measures of every unit, as sinks: ``surgery.prune.importance`` says what is what.

A layer's numbers are in a file once the layer is over, so that a killed pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.experts.dense_model import DenseModel
from mindformers_ext.jobs.experts.probe import Arrays, Part

Layer = dict[str, np.ndarray]
Place = Callable[[int], Path]


def keep_layer(path: Path, found: Mapping[str, np.ndarray]) -> None:
    """Write one layer's numbers whole."""
    with fresh_file(path, overwrite=True) as beside, beside.open("wb") as file:
        np.savez(file, **{name: np.asarray(value, np.float64) for name, value in found.items()})


class _Running:
    """Sums over tokens of values (T, n), and over rows of text the squares of each one's mean absolute value."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: np.ndarray | float = 0.0
        self.square: np.ndarray | float = 0.0
        self.absolute: np.ndarray | float = 0.0

    def add(self, values: np.ndarray, rows: np.ndarray) -> None:
        wide = values.astype(np.float64)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        counts = np.diff(np.append(starts, len(rows)))
        means = np.add.reduceat(np.abs(wide), starts) / counts[:, None]
        self.tokens += len(wide)
        self.total = self.total + wide.sum(0)
        self.square = self.square + np.square(wide).sum(0)
        self.absolute = self.absolute + np.square(means).sum(0)

    def found(self, name: str) -> Layer:
        mean = np.asarray(self.total / self.tokens)
        variance = np.maximum(np.asarray(self.square / self.tokens) - mean * mean, 0.0)
        absolute = np.sqrt(self.absolute)
        return {f"{name}_absolute": absolute, f"{name}_mean": mean, f"{name}_variance": variance}


class ForwardMeasures:
    """A sink of ``probe.forward``: activations, and what follows from a layer's weights (``importance.FORWARD``).

    A row of text always comes in one part.
    """

    values: tuple[str, ...] = ("input", "attention_input", "context", "mlp_input", "hidden", "output")
    gradients: tuple[str, ...] = ()

    def __init__(self, model: DenseModel, shape: ModelShape, place: Place) -> None:
        self._model, self._shape, self._place = model, shape, place
        width = shape.intermediate_size + shape.num_attention_heads * shape.head_dim + 3 * shape.hidden_size
        self.nbytes = 8 * 4 * width + 8 * max(4096 * shape.intermediate_size, 1)
        self._begin()

    def _begin(self) -> None:
        self._sums = {name: _Running() for name in ("attention_input", "context", "mlp_input", "hidden", "final")}
        self._cosines, self._tokens = 0.0, 0

    def take(self, layer: int, part: Part, values: Arrays, gradients: Arrays) -> None:
        """Add a part's tokens."""
        for name in ("attention_input", "context", "mlp_input", "hidden"):
            self._sums[name].add(values[name], part.rows)
        came, left = (values[name].astype(np.float64) for name in ("input", "output"))
        lengths = np.linalg.norm(came, axis=1) * np.linalg.norm(left, axis=1)
        self._cosines += float(((came * left).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)).sum())
        self._tokens += len(came)
        if layer == self._shape.num_hidden_layers - 1:
            self._sums["final"].add(self._final(left), part.rows)

    def end(self, layer: int) -> None:
        """Keep the layer."""
        found = self._sums["hidden"].found("neuron") | self._sums["context"].found("context")
        norms = [self._sums[name].found("hidden")["hidden_absolute"] for name in ("attention_input", "mlp_input")]
        found["hidden_absolute"] = np.sum(norms, axis=0)
        found["layer_influence"] = np.array(1.0 - self._cosines / max(self._tokens, 1))
        if self._sums["final"].tokens:
            found["final_absolute"] = self._sums["final"].found("final")["final_absolute"]
        keep_layer(self._place(layer), found | weight_measures(self._model, layer, self._shape))
        self._begin()

    def _final(self, left: np.ndarray) -> np.ndarray:
        """What the last norm makes of the last layer's output."""
        square = np.square(left).mean(1, keepdims=True)
        return left / np.sqrt(square + self._model.spec.rms_norm_eps) * self._model.norm()


def weight_measures(model: DenseModel, layer: int, shape: ModelShape) -> Layer:
    """Sums of squares of a layer's weights, by unit."""
    found: Layer = {}
    rows: dict[str, np.ndarray] = {}  # by matrix, of each row and of each column
    columns: dict[str, np.ndarray] = {}
    for name, weight in model.layer(layer):
        if weight.ndim == 2:
            square = np.square(weight.astype(np.float64))
            rows[name], columns[name] = square.sum(1), square.sum(0)
        del weight
    found["neuron_out"] = columns["feed_forward.w2.weight"]
    found["neuron_weight"] = found["neuron_out"] + sum(rows[f"feed_forward.{name}.weight"] for name in ("w1", "w3"))
    found["context_out"] = columns["attention.wo.weight"]
    query = rows["attention.wq.weight"] + found["context_out"]
    found["head_weight"] = query.reshape(-1, shape.head_dim).sum(1)
    key = rows["attention.wk.weight"] + rows["attention.wv.weight"]
    found["group_weight"] = key.reshape(-1, shape.head_dim).sum(1)
    writes = [rows[name] for name in ("attention.wo.weight", "feed_forward.w2.weight")]
    reads = [columns[f"attention.{name}.weight"] for name in ("wq", "wk", "wv")]
    reads += [columns[f"feed_forward.{name}.weight"] for name in ("w1", "w3")]
    found["hidden_weight"] = np.sum([*writes, *reads], axis=0)
    return found


class TaylorMeasures:
    """A sink of ``probe.backward``: how the loss changes to first order (``importance.TAYLOR``).

    Gradients of a layer's three feed-forward matrices are summed over all text, float32.
    """

    values: tuple[str, ...] = ("attention_input", "context", "mlp_input", "gate", "hidden")
    gradients: tuple[str, ...] = ("attention_input", "context", "mlp_input", "gate_linear", "hidden", "mlp_output")

    def __init__(self, model: DenseModel, shape: ModelShape, place: Place) -> None:
        self._model, self._shape, self._place = model, shape, place
        self.nbytes = 2 * 3 * 4 * shape.intermediate_size * shape.hidden_size
        self._begin()

    def _begin(self) -> None:
        shape = self._shape
        wide = (shape.intermediate_size, shape.hidden_size)
        self._matrices = {
            "gate_proj": np.zeros(wide, np.float32),
            "up_proj": np.zeros(wide, np.float32),
            "down_proj": np.zeros(wide[::-1], np.float32),
        }
        self._heads = np.zeros(shape.num_attention_heads)
        self._hidden = np.zeros(shape.hidden_size)

    def take(self, layer: int, part: Part, values: Arrays, gradients: Arrays) -> None:
        """Add a part's tokens."""
        self._matrices["gate_proj"] += gradients["gate_linear"].T @ values["mlp_input"]
        self._matrices["up_proj"] += (gradients["hidden"] * values["gate"]).T @ values["mlp_input"]
        self._matrices["down_proj"] += gradients["mlp_output"].T @ values["hidden"]
        changes = (values["context"].astype(np.float64) * gradients["context"]).reshape(
            len(part.rows), self._shape.num_attention_heads, self._shape.head_dim
        )
        self._heads += np.abs(changes.sum(-1)).sum(0)
        for name in ("attention_input", "mlp_input"):
            self._hidden += np.abs(values[name].astype(np.float64) * gradients[name]).sum(0)

    def end(self, layer: int) -> None:
        """Keep the layer."""
        neurons = np.zeros(self._shape.intermediate_size)
        for name, gradient in self._matrices.items():
            change = np.abs(self._model.matrix(name, layer) * gradient)
            neurons += change.sum(0 if name == "down_proj" else 1, dtype=np.float64)
        found = {"neuron_taylor": neurons, "head_taylor": self._heads, "hidden_taylor": self._hidden}
        keep_layer(self._place(layer), found)
        self._begin()


SINKS: dict[str, type[ForwardMeasures] | type[TaylorMeasures]] = {"forward": ForwardMeasures, "taylor": TaylorMeasures}
