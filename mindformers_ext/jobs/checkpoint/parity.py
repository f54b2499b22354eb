# SPDX-License-Identifier: Apache-2.0
"""Compares our network with transformers': the same weights from two files, the same tokens, every logit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.packing import check_ids
from mindformers_ext.jobs.checkpoint.judge import open_judge
from mindformers_ext.jobs.checkpoint.source import described_layout, open_ms, read_config
from mindformers_ext.jobs.engine.door import open_engine
from mindformers_ext.weights.convert import plan_relayout
from mindformers_ext.weights.layouts import Layout, resolve_layout

DEFAULT_TEXT = "Return a new list containing all items from the iterable in ascending order."
RANDOM_TOKENS = 48  # compared when the folder has no tokenizer


@dataclass(frozen=True)
class ParityResult:
    """The largest absolute difference of any logit, over ``tokens`` tokens; ``largest`` is the largest logit itself."""

    difference: float
    largest: float
    tokens: int
    vocab_size: int
    checkpoint: Path
    folder: Path


def check_parity(folder: Path, checkpoint: Path, texts: Sequence[str] = (), engine: str = "ms") -> ParityResult:
    """Run both networks on each text.

    Args:
        folder: Hugging Face model folder, run by transformers in float32.
        checkpoint: a MindSpore ``.ckpt`` or ``.safetensors`` file, run by our network, dropless and in float32.
        texts: encoded by the folder's tokenizer; none given means one sentence, or random tokens without a tokenizer.
        engine: which of our engines runs the checkpoint.

    Raises:
        UserError: files that cannot be read, or a checkpoint that is not of the folder's model.
    """
    spec = _spec(folder)
    weights = _read_weights(checkpoint, spec)
    ours = open_engine(engine)  # before transformers: see pt/hf_reference.py
    reference = open_judge(folder)
    rows = [_ids(reference.encode(text), spec) for text in texts or _default_texts(folder)]
    if not rows:
        rows = [np.random.default_rng(0).integers(0, spec.vocab_size, RANDOM_TOKENS)]
    padded = _padded(rows)
    network = ours.build(NetworkSpec(model=spec, seq_length=padded.shape[1]))
    network.load(weights)
    difference = largest = 0.0
    for row, found in zip(rows, network.logits(padded), strict=True):
        expected = reference.logits(row[None])[0]
        difference = max(difference, float(np.abs(found[: len(row)] - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    tokens = sum(len(row) for row in rows)
    return ParityResult(difference, largest, tokens, spec.vocab_size, checkpoint, folder)


def _spec(folder: Path) -> ModelSpec:
    """The folder's model. Capacity is none of Hugging Face's words: the spec is dropless already, and must be."""
    spec = model_spec_from_hf(read_config(folder))
    return replace(spec, moe=replace(spec.moe, capacity_factor=0.0)) if spec.moe else spec


def _read_weights(checkpoint: Path, spec: ModelSpec) -> dict[str, np.ndarray]:
    """The model's tensors in the file, of whatever layout, as our network takes them; training state stays behind."""
    reader, meta = open_ms(checkpoint)
    with closing(reader):
        layout = resolve_layout(reader.infos, spec, described_layout(meta))
        return dict(plan_relayout(reader, spec, layout, Layout()).run(reader))


def _default_texts(folder: Path) -> list[str]:
    return [DEFAULT_TEXT] if (folder / "tokenizer_config.json").is_file() else []


def _ids(ids: list[int], spec: ModelSpec) -> np.ndarray:
    check_ids(ids, spec.vocab_size, "the text")
    if len(ids) > spec.max_position_embeddings:
        raise UserError(
            f"the text has {len(ids)} tokens, the model {spec.max_position_embeddings} positions: shorten it"
        )
    return np.asarray(ids, dtype=np.int32)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """All rows in one batch, zeros behind the shorter ones: attention is causal and routing drops nothing, so what
    stands behind a token does not change it. One shape is one compilation."""
    batch = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int32)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return batch
