# SPDX-License-Identifier: Apache-2.0
"""The router's weights of an assembled mixture: prompts to tokens, tokens to embeddings or states, states to rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.tokenizer_settings import read_settings
from mindformers_ext.data.tokenizers import open_tokenizer
from mindformers_ext.formats.dtypes import BFLOAT16, cast
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.merge.models import Model
from mindformers_ext.jobs.merge.moe_config import AVERAGE, CHEAP, UNIFORM, WITHOUT_PROMPTS, Expert, MoEConfig
from mindformers_ext.surgery.merge.architectures import EMBEDDING

ALIKE = 5.0  # condition number of a layer's rows from which on prompts are called too similar


def gate_rows(config: MoEConfig, base: Model, seed: int) -> tuple[np.ndarray, list[str]]:
    """float32 (layers, experts with the shared ones last, hidden) and what the run should say."""
    from mindformers_ext.surgery.merge.random_gates import condition, random_rows

    if config.gate_mode in WITHOUT_PROMPTS:
        shape = (base.layers, len(config.experts) + len(config.shared), base.reader.infos[EMBEDDING.name].shape[1])
        return random_rows(shape, seed, config.gate_mode == UNIFORM), []
    prompts = Prompts(base)
    rows = _cheap(config, base, prompts) if config.gate_mode == CHEAP else _hidden(config, base, prompts)
    chosen = rows[:, : len(config.experts)]  # a shared expert is always there, it need not differ
    alike = [layer for layer in range(base.layers) if condition(chosen[layer]) > ALIKE]
    notes = (
        [
            f"the prompts of the experts are hard to tell apart in {len(alike)} of {base.layers} layers (first "
            f"{alike[0]}): write prompts that differ more"
        ]
        if alike
        else []
    )
    return rows, notes


class Prompts:
    """Tokenises lists of prompts as mergekit does: BOS before each, padded on the left."""

    def __init__(self, base: Model) -> None:
        """The tokenizer of the base model."""
        self._tokenizer = open_tokenizer(base.folder)
        self._bos = str(read_settings(base.folder).texts.get("bos_token", ""))
        self._rows = base.reader.infos[EMBEDDING.name].shape[0]
        self._name = base.name

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and a 0/1 mask, both int64 (prompts, tokens)."""
        found = [[int(token) for token in ids] for ids in self._tokenizer.encode_batch([self._bos + t for t in texts])]
        length = max(map(len, found))
        if not all(found):
            raise UserError(
                f"the prompt '{texts[[bool(ids) for ids in found].index(False)]}' has no token at all: write some text"
            )
        if max(max(ids) for ids in found) >= self._rows:
            raise UserError(f"the tokenizer of '{self._name}' gives ids beyond its embedding of {self._rows} rows")
        ids = np.zeros((len(found), length), np.int64)
        mask = np.zeros((len(found), length), np.int64)
        for row, one in enumerate(found):
            ids[row, length - len(one) :] = one
            mask[row, length - len(one) :] = 1
        return ids, mask


def _embeddings(base: Model, ids: np.ndarray) -> Array:
    """The rows of the embedding for ``ids``, (prompts, tokens, hidden), each different row read once."""
    unique, places = np.unique(ids, return_inverse=True)
    rows = np.stack([base.reader.read(EMBEDDING.name, (int(token),)) for token in unique])
    return rows[places.reshape(ids.shape)]


def _cheap(config: MoEConfig, base: Model, prompts: Prompts) -> np.ndarray:
    from mindformers_ext.surgery.merge.gates import cheap_embedding, cheap_row

    def direction(texts: Sequence[str]) -> Any:
        ids, mask = prompts.batch(texts)
        return cheap_embedding(_embeddings(base, ids).astype(np.float32), mask)

    rows = [
        cheap_row(direction(e.positive), direction(e.negative) if e.negative else None).numpy()
        for e in (*config.experts, *config.shared)
    ]
    return np.repeat(np.concatenate(rows)[None], base.layers, axis=0)


def _hidden(config: MoEConfig, base: Model, prompts: Prompts) -> np.ndarray:
    from mindformers_ext.jobs.engine.door import open_layer_states
    from mindformers_ext.surgery.merge.gates import hidden_rows, prompt_states

    def bits(array: Array) -> np.ndarray:
        return cast(array, BFLOAT16)[0].view(np.uint16)

    engine = open_layer_states(base.folder, lambda name: bits(base.reader.read(name)))
    average = config.gate_mode == AVERAGE

    def pooled(texts: Sequence[str]) -> Any:
        ids, mask = prompts.batch(texts)
        return prompt_states(engine.states(bits(_embeddings(base, ids)), mask), mask, average)

    def rows(expert: Expert) -> np.ndarray:
        return hidden_rows(pooled(expert.positive), pooled(expert.negative) if expert.negative else None)

    return np.stack([rows(expert) for expert in (*config.experts, *config.shared)], axis=1)
