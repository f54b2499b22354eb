# SPDX-License-Identifier: Apache-2.0
"""Fold masks into a dense decoder's weights and cut what they leave out: the pruned model equals the masked one.

Which axis of a tensor is cut by what follows from its dimensions in size letters (``core.parameters``); which mask it
is multiplied by stands in ``FOLDS``. Names are Hugging Face's without the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.surgery.prune.hard_concrete import Floats

Indices = npt.NDArray[np.int64]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight")
# By the tensor's ending: what its rows and what its columns are multiplied by. A value head's factor goes into its rows
# where one query head reads it, and into the output's columns where several share it.
FOLDS: dict[str, tuple[str, str]] = {
    "embed_tokens.weight": ("", "embedding"),
    **dict.fromkeys(NORMS, ("hidden", "")),
    "v_proj.weight": ("value rows", ""),
    "v_proj.bias": ("value rows", ""),
    "o_proj.weight": ("attention", "output columns"),
    "o_proj.bias": ("attention", ""),
    "up_proj.weight": ("intermediate", ""),
    "up_proj.bias": ("intermediate", ""),
    "down_proj.weight": ("mlp", ""),
    "down_proj.bias": ("mlp", ""),
    "lm_head.weight": ("", "head"),
}


@dataclass(frozen=True, eq=False)
class LayerMasks:
    """The masks of one layer in full: heads (H), key heads (N), intermediate (F), and two numbers."""

    heads: Floats
    kv_heads: Floats
    intermediate: Floats
    attention: float
    mlp: float


@dataclass(frozen=True, eq=False)
class FullMasks:
    """Every mask of a network, those that are not pruned as ones. ``tied``: the head is the embedding.

    ``fold_head``: also scale the head by the hidden mask, as LLM-Shearing did; the pruned model is then another one.
    """

    shape: ModelShape
    hidden: Floats
    layers: tuple[LayerMasks, ...]
    tied: bool = False
    fold_head: bool = False

    @property
    def kept_layers(self) -> list[int]:
        """Numbers of the layers that stay."""
        return [number for number, layer in enumerate(self.layers) if layer.attention and layer.mlp]

    def indices(self, letter: str, layer: int | None) -> Indices | None:
        """The places that stay along an axis of this word of size letters; None: all."""
        width = self.shape.head_dim
        if letter == "D":
            return np.flatnonzero(self.hidden)
        if layer is None or letter not in ("HP", "NP", "F"):
            return None
        own = self.layers[layer]
        if letter == "F":
            return np.flatnonzero(own.intermediate)
        heads = np.flatnonzero(own.heads if letter == "HP" else own.kv_heads)
        return np.asarray((heads[:, None] * width + np.arange(width)).reshape(-1))

    def factor(self, word: str, layer: int | None) -> Floats | None:
        """What an axis is multiplied by, in the source's sizes; None: nothing."""
        if word == "hidden":
            return self.hidden
        if word == "embedding":
            return None if self.tied else self.hidden
        if word == "head":
            return self.hidden if self.fold_head and not self.tied else None
        if layer is None:
            return None
        own, shape = self.layers[layer], self.shape
        if word == "intermediate":
            return own.intermediate
        if word in ("attention", "mlp"):
            return self.hidden * (own.attention if word == "attention" else own.mlp)
        shared = shape.heads_per_group > 1
        if word == ("output columns" if shared else "value rows"):
            return np.repeat(own.heads, shape.head_dim)
        return None


def full_masks(
    values: Mapping[str, npt.ArrayLike], shape: ModelShape, tied: bool, fold_head: bool = False
) -> FullMasks:
    """All masks from those by module; ``UserError`` where one has another shape or is not from 0 to 1."""
    problems = Problems("the masks")
    given = {name: np.asarray(value, np.float64) for name, value in values.items()}
    for name, value in given.items():
        if value.shape != shape.mask_shape(name):
            problems.add(f"{name} has shape {list(value.shape)}", f"this model's is {list(shape.mask_shape(name))}")
        elif not np.all((value >= 0) & (value <= 1)):
            problems.add(f"{name} has values that are no numbers from 0 to 1", "give the masks of a whole run")
    problems.raise_if_any()
    layers, groups, each = shape.num_hidden_layers, shape.num_key_value_heads, shape.heads_per_group

    def own(name: str, *size: int) -> Floats:
        return given.get(name, np.ones(size))

    kv = own("kv_head", layers, groups)
    heads = (kv[:, :, None] * own("q_in_group", layers, each)[:, None]).reshape(layers, -1) * own("head", layers, 1)
    if each == 1:
        kv = heads
    whole = own("layer", layers)
    attention, mlp = whole * own("head_layer", layers), whole * own("mlp", layers)
    inner = own("intermediate", layers, shape.intermediate_size)
    found = tuple(LayerMasks(heads[i], kv[i], inner[i], float(attention[i]), float(mlp[i])) for i in range(layers))
    return FullMasks(shape, own("hidden", shape.hidden_size), found, tied, fold_head)


def pruned_shape(masks: FullMasks) -> ModelShape:
    """The sizes that are left.

    Raises:
        UserError: layers differ, half a layer is left, or nothing is: no model of one shape.
    """
    problems = Problems("the pruned model has no shape that a model folder can describe")
    kept = masks.kept_layers
    halves = [n for n, layer in enumerate(masks.layers) if bool(layer.attention) != bool(layer.mlp)]
    problems.add_names("layers", "keep one half alone", halves, "prune whole layers (pruning_modules: layer)")
    sizes = {
        "num_attention_heads": {np.count_nonzero(masks.layers[n].heads) for n in kept},
        "num_key_value_heads": {np.count_nonzero(masks.layers[n].kv_heads) for n in kept},
        "intermediate_size": {np.count_nonzero(masks.layers[n].intermediate) for n in kept},
        "hidden_size": {np.count_nonzero(masks.hidden)},
        "num_hidden_layers": {len(kept)},
    }
    for name, found in sizes.items():
        if len(found) > 1:
            problems.add(f"{name} is {', '.join(map(str, sorted(found)))} by layer", "prune to a target_model")
        elif found in (set(), {0}):
            problems.add(f"{name} is 0", "masks that leave nothing make no model")
    problems.raise_if_any()
    left = {name: int(next(iter(found))) for name, found in sizes.items()}
    return ModelShape(head_dim=masks.shape.head_dim, **left)


@dataclass(frozen=True, eq=False)
class TensorCut:
    """What becomes of one tensor. ``rows`` and ``columns`` that stay (None: all), and their factors, cut already."""

    rows: Indices | None
    columns: Indices | None
    row_factor: npt.NDArray[np.float32] | None
    column_factor: npt.NDArray[np.float32] | None

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is left of ``source``."""
        found = (self.rows, self.columns)[: len(source)]
        return tuple(size if kept is None else len(kept) for size, kept in zip(source, found, strict=True))

    def blocks(self, stored: Iterable[npt.NDArray]) -> Iterator[npt.NDArray]:
        """The tensor from consecutive blocks of its stored rows: in float32 where it is scaled, else as stored."""
        start = done = 0
        for block in stored:
            stop = start + len(block)
            taken = block
            if self.rows is not None:
                low, high = np.searchsorted(self.rows, (start, stop))
                taken = block[self.rows[low:high] - start]
            if self.columns is not None and block.ndim == 2:
                taken = np.take(taken, self.columns, 1)
            taken = self._scaled(taken, done)
            start, done = stop, done + len(taken)
            if len(taken):
                yield np.ascontiguousarray(taken)

    def _scaled(self, taken: npt.NDArray, done: int) -> npt.NDArray:
        if self.row_factor is None and self.column_factor is None:
            return taken
        wide = taken.astype(np.float32)
        if self.row_factor is not None:
            part = self.row_factor[done : done + len(taken)]
            wide *= part if wide.ndim == 1 else part[:, None]
        if self.column_factor is not None:
            wide *= self.column_factor
        return wide


def tensor_cut(name: str, dims: str, masks: FullMasks, layer: int | None) -> TensorCut:
    """What becomes of the tensor ``name`` of dimensions ``dims`` ("HP D") in layer ``layer``."""
    letters = dims.split()
    kept = [masks.indices(letter, layer) for letter in letters]
    words = next((words for ending, words in FOLDS.items() if name.endswith(ending)), ("", ""))
    factors = []
    for word, places in zip(words, kept, strict=False):
        factor = masks.factor(word, layer) if word else None
        cut = factor if factor is None or places is None else factor[places]
        factors.append(None if cut is None or np.all(cut == 1) else np.asarray(cut, np.float32))
    none: list[None] = [None]
    rows, columns = (kept + none)[:2]
    row_factor, column_factor = (factors + none)[:2]
    return TensorCut(rows, columns, row_factor, column_factor)
