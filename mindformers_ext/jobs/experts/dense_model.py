# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder of a decoder whose weights are read a layer, or some rows, at a time, as float32."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.core.parameters import LAYER, layer_rows, shape_of, size_letters
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.tensors import Reader
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.weights.convert import plan_to_mindspore
from mindformers_ext.weights.llama import EMBEDDING, FINAL_NORM, HEAD
from mindformers_ext.weights.plan import Plan

TEMPLATE = "layers.{}.mlp.gate_proj.weight"
POINT_OF = {"gate_proj": "gate", "up_proj": "hidden"}  # which point's values a template's features are
ROWS = 4096  # of the embedding or the head, read at once
_PATTERN = re.compile(r"layers\.\{\}\.mlp\.(" + "|".join(POINT_OF) + r")\.weight")


def model_name(folder: Path) -> str:
    """The name of a model's folder as given, after which output folders are called; a link keeps its own."""
    return Path(os.path.abspath(folder)).name


def template_kind(template: str) -> str:
    """ "gate_proj" or "up_proj", the matrix that ``template`` names.

    Raises:
        UserError: a template of another form.
    """
    found = _PATTERN.fullmatch(template)
    if not found:
        raise UserError(
            f"--templates {template!r} names no matrix to go by: give '{TEMPLATE}' or 'layers.{{}}.mlp.up_proj.weight'"
        )
    return found[1]


@dataclass(frozen=True)
class StreamedModel:
    """An open model, dense or with mixtures; ``close`` it after use."""

    folder: Path
    spec: ModelSpec
    reader: Reader
    plan: Plan

    @property
    def name(self) -> str:
        """See ``model_name``."""
        return model_name(self.folder)

    def close(self) -> None:
        """Let go of the files."""
        self.reader.close()

    def layer(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """The weights of one layer by the names below ``model.layers.N.``."""
        prefix = LAYER.format(index)
        steps = tuple(step for step in self.plan.steps if step.target.name.startswith(prefix))
        for name, array in replace(self.plan, steps=steps, copies=()).run(self.reader):
            yield name.removeprefix(prefix), array
            del array  # or it lives on while the next one is read

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (..., D) of ``ids``; only the blocks of the table that hold some of them are read."""
        unique, places = np.unique(ids, return_inverse=True)
        rows = np.empty((len(unique), self.spec.hidden_size), np.float32)
        blocks = unique // ROWS
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            first, last = int(unique[here[0]]), int(unique[here[-1]])
            table = self.reader.read(str(EMBEDDING.hf), (slice(first, last + 1),))
            rows[here] = self._float(table[unique[here] - first])
        return rows[places.reshape(ids.shape)]

    def norm(self) -> np.ndarray:
        """The weight of the final norm (D)."""
        return self._float(self.reader.read(str(FINAL_NORM.hf)))

    def head(self) -> Iterator[np.ndarray]:
        """The head (V, D) in blocks of rows; of a tied model the embedding."""
        name = str((EMBEDDING if self.spec.tie_word_embeddings else HEAD).hf)
        for first in range(0, self.spec.vocab_size, ROWS):
            yield self._float(self.reader.read(name, (slice(first, first + ROWS),)))

    @cached_property
    def layer_bytes(self) -> tuple[int, int]:
        """Bytes of the largest layer's weights and of the largest one of them, as float32."""
        sizes = size_letters(self.spec)
        kinds = {self.spec.layer(index) for index in range(self.spec.num_hidden_layers)}
        counts = [[4 * prod(shape_of(row.dims, sizes)) for row in layer_rows(kind)] for kind in kinds]
        return max(map(sum, counts)), max(map(max, counts))

    def check_layers(self, layers: tuple[int, ...] | None) -> tuple[int, ...]:
        """The layers asked for, all where None; one that is not there is a ``UserError``."""
        count = self.spec.num_hidden_layers
        if layers is None:
            return tuple(range(count))
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong or not layers:
            raise UserError(
                f"--specify_layer names {listed(wrong) or 'no layer'}: the model has layers 0 to {count - 1}"
            )
        return tuple(sorted(set(layers)))

    @staticmethod
    def _float(array: np.ndarray) -> np.ndarray:
        return np.asarray(array, dtype=np.float32)


class DenseModel(StreamedModel):
    """One without experts."""

    def matrix(self, name: str, layer: int) -> np.ndarray:
        """``gate_proj``, ``up_proj`` (F, D) or ``down_proj`` (D, F) of one layer."""
        return self._float(self.reader.read(f"model.layers.{layer}.mlp.{name}.weight"))


def open_dense(folder: Path) -> DenseModel:
    """The dense decoder in ``folder``; names, shapes and types are checked, no data is read but of a doubled head.

    Raises:
        UserError: no such folder, a mixture, or weights that are not those of its config.json.
    """
    if not folder.is_dir():
        raise UserError(f"--model_path '{folder}' is no folder: give the Hugging Face folder of a dense LLaMA")
    spec = model_spec_from_hf(read_config(folder))
    if spec.moe is not None:
        raise UserError(f"'{folder}' is a mixture of experts already: give a dense model")
    return DenseModel(folder, spec, *open_weights(folder, spec))


def open_weights(folder: Path, spec: ModelSpec) -> tuple[Reader, Plan]:
    """The open weights of a model folder and the plan that makes float32 of them under our names; ``UserError`` where
    they are not those of ``spec``."""
    reader = open_hf(folder)
    try:
        plan = plan_to_mindspore(reader, spec, "fp32")
        plan.check_copies(reader)
    except BaseException:
        reader.close()
        raise
    return reader, plan
