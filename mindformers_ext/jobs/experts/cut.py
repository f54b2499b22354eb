# SPDX-License-Identifier: Apache-2.0
"""Which tensors a LLaMA-MoE has, and which neurons of which dense tensor each holds. Names are those of its files.

Neuron i of a feed-forward part is row i of gate and up and column i of down (see ``LayerSplit``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mindformers_ext.formats.tensors import Array, TensorInfo
from mindformers_ext.surgery.experts.split import LayerSplit

MLP = "model.layers.{}.mlp."
DENSE = {
    "gate_proj.weight": ("weight_gate", 0),
    "up_proj.weight": ("weight_up", 0),
    "down_proj.weight": ("weight_down", 1),
}
ROUTED, RESIDUAL = "calculator.experts.", "residual_block.calculator.experts."
INNER = "moe_layer."  # before gate and routed experts where there are residual ones beside them


@dataclass(frozen=True, eq=False)
class Cut:
    """One expert's part of a dense matrix: ``info`` is what is written, ``neurons`` are taken along ``axis``."""

    info: TensorInfo
    axis: int
    neurons: np.ndarray

    def of(self, dense: Array) -> Array:
        """The part of the dense matrix."""
        return np.ascontiguousarray(np.take(dense, self.neurons, self.axis))

    def into(self, dense: Array, part: Array) -> None:
        """Put an expert's matrix where it came from."""
        if self.axis == 0:
            dense[self.neurons] = part
        else:
            dense[:, self.neurons] = part


def routed_prefix(layer: int, split: LayerSplit) -> str:
    """What the names of a layer's gate and routed experts begin with."""
    return MLP.format(layer) + (INNER if split.residual else "")


def cuts(layer: int, split: LayerSplit, matrix: str, dense: TensorInfo) -> Iterator[Cut]:
    """What becomes of the matrix ``matrix`` (a key of ``DENSE``) of a layer, one expert after the other."""
    name, axis = DENSE[matrix]
    groups = ((routed_prefix(layer, split) + ROUTED, split.experts), (MLP.format(layer) + RESIDUAL, split.residual))
    for prefix, experts in groups:
        for number, neurons in enumerate(experts):
            shape = list(dense.shape)
            shape[axis] = len(neurons)
            yield Cut(TensorInfo(f"{prefix}{name}.{number}", tuple(shape), dense.dtype), axis, neurons)


def dense_matrix(name: str, layers: int) -> tuple[int, str] | None:
    """Layer and matrix where ``name`` is a feed-forward matrix of a dense model, else None."""
    for layer in range(layers):
        start = MLP.format(layer)
        if name.startswith(start) and name[len(start) :] in DENSE:
            return layer, name[len(start) :]
    return None


def in_type(info: TensorInfo, dtype: np.dtype | None) -> TensorInfo:
    """``info`` as it is written in ``dtype``; None keeps the stored type."""
    return replace(info, dtype=dtype) if dtype is not None else info


def ids_of(splits: Mapping[int, LayerSplit]) -> dict[str, np.ndarray]:
    """All splits as arrays: per layer its experts' neurons one after the other, and how many each has."""
    arrays = {}
    for layer, split in splits.items():
        arrays[f"neurons.{layer}"] = np.concatenate((*split.experts, *split.residual)).astype(np.int32)
        arrays[f"sizes.{layer}"] = np.array(split.sizes, np.int32)
        arrays[f"residual.{layer}"] = np.array(split.residual_sizes, np.int32)
    return arrays


def splits_of(arrays: Mapping[str, np.ndarray], width: int, layers: int) -> dict[int, LayerSplit]:
    """The inverse of ``ids_of``; ``KeyError`` or ``UserError`` where the arrays are no splits of such a model."""
    result = {}
    for layer in range(layers):
        neurons = arrays[f"neurons.{layer}"].reshape(-1)
        sizes, residual = arrays[f"sizes.{layer}"].reshape(-1), arrays[f"residual.{layer}"].reshape(-1)
        parts = np.split(neurons, np.cumsum(np.concatenate((sizes, residual)))[:-1])
        result[layer] = LayerSplit(width, tuple(parts[: len(sizes)]), tuple(parts[len(sizes) :]))
    return result
