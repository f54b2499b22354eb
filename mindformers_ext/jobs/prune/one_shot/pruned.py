# SPDX-License-Identifier: Apache-2.0
"""A pruned model that nobody has written yet: its weights are cut while they are read, so that a probe can run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.formats.tensors import Array, Index, TensorInfo
from mindformers_ext.jobs.experts.dense_model import DenseModel
from mindformers_ext.jobs.prune.cut import Change, Piece, longest_type, pieces_of, pruned_config
from mindformers_ext.jobs.prune.source import DenseSource
from mindformers_ext.surgery.prune.cut import FullMasks, pruned_shape
from mindformers_ext.weights.convert import plan_to_mindspore

BIAS_KEYS = {"mlp.down_proj.bias": "mlp_bias", "self_attn.o_proj.bias": "attention_bias"}


class CutReader:
    """The tensors that masks leave of a dense model (``formats.tensors.Reader``); the dense one stays open."""

    def __init__(self, dense: DenseSource, pieces: list[Piece]) -> None:
        self._dense = dense
        self._last: tuple[str, Array] | None = None
        self._pieces = {piece.info.name: piece for piece in pieces}
        self.infos: Mapping[str, TensorInfo] = {name: piece.info for name, piece in self._pieces.items()}

    def read(self, name: str, index: Index = ()) -> Array:
        """The tensor, or a part; of one whose rows all stay, such as the embedding, only the part is read."""
        piece = self._pieces[name]
        if index and isinstance(index[0], slice) and piece.dense and piece.cut and piece.cut.rows is None:
            stored = self._dense.reader.read(piece.dense.step.target.name, index[:1])
            if piece.cut.row_factor is None:
                blocks = list(piece.cut.blocks([stored]))
                whole = blocks[0] if blocks else np.empty((0, *piece.info.shape[1:]), stored.dtype)
                rest = (slice(None), *index[1:])
                return np.array(whole[rest])
        if self._last is None or self._last[0] != name:  # whoever reads in blocks reads one tensor after the other
            self._last = None
            blocks = list(piece.blocks(self._dense.reader))
            whole = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
            self._last = (name, whole.astype(piece.info.dtype, copy=False))  # as it will be written
        return np.array(self._last[1][index])

    def close(self) -> None:
        """Nothing: the dense model is closed by whoever opened it."""


def biases_of(changes: Mapping[str, Change]) -> dict[str, bool]:
    """What config.json has to say of biases that ``changes`` bring."""
    return {key: True for ending, key in BIAS_KEYS.items() if any(name.endswith(ending) for name in changes)}


def pruned_words(
    dense: DenseSource, full: FullMasks, pieces: list[Piece], changes: Mapping[str, Change]
) -> dict[str, Any]:
    """The config.json of what is left."""
    shape = pruned_shape(full)
    return {**pruned_config(dense, shape, full.kept_layers, longest_type(pieces)), **biases_of(changes)}


def pruned_model(dense: DenseSource, full: FullMasks, changes: Mapping[str, Change], folder: Path) -> DenseModel:
    """What the masks leave, as a model that a probe can run. ``folder``: the dense model's, for its name."""
    pieces = list(pieces_of(dense, full, None, changes))
    spec = model_spec_from_hf(pruned_words(dense, full, pieces, changes))
    reader = CutReader(dense, pieces)
    return DenseModel(folder, spec, reader, plan_to_mindspore(reader, spec, "fp32"))
