# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face model folder with random weights: something small to convert, train and compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.config.hf import hf_config_from_spec
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.tokenizers import SentencePieceTokenizer
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.jobs.checkpoint.hf_code import with_code
from mindformers_ext.weights.convert import rule_set

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class TinyModelRequest:
    """Which model, and where. ``tokenizer``: a SentencePiece model to put into the folder, or None."""

    output_dir: Path
    spec: ModelSpec
    tokenizer: Path | None = None
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class TinyModelSummary:
    """What was written."""

    model_type: str
    tensors: int
    parameters: int


def spec_from_yaml_file(path: Path) -> NetworkSpec:
    """The network that a MindFormers YAML trains, so that its sizes are said once."""
    return network_spec_from_yaml(load_yaml(path))


def make_tiny_model(request: TinyModelRequest) -> TinyModelSummary:
    """Write config.json, safetensors and, where given, the tokenizer, as transformers saves them.

    Matrices are normal with the model's ``initializer_range``, norms are 1. The same seed and sizes give the same file.

    Raises:
        UserError: sizes that break a rule, a tokenizer that does not fit them, or an output that exists.
    """
    spec = request.spec
    problems = Problems("make_tiny_model")
    spec.collect(problems)
    problems.raise_if_any()
    if request.tokenizer:
        _check_tokenizer(request.tokenizer, spec)
    config = hf_config_from_spec(spec)
    targets = [
        TensorInfo(name, shape, np.dtype(np.float32))
        for binding in rule_set(spec).bindings
        for name, shape in binding.hf.items()
    ]
    with fresh_folder(request.output_dir, request.overwrite) as folder:
        with SafetensorsDirWriter(folder, targets, SHARD_BYTES) as writer:
            for name, array in _random(targets, spec.initializer_range, request.seed):
                writer.add(name, array)
        config = with_code(folder, config)
        _write_json(folder / "config.json", {**config, "torch_dtype": "float32", "use_cache": True})
        if request.tokenizer:
            shutil.copyfile(request.tokenizer, folder / "tokenizer.model")
            _write_json(folder / "tokenizer_config.json", _tokenizer_config(spec))
    return TinyModelSummary(spec.model_type, len(targets), sum(info.nbytes for info in targets) // 4)


def _random(targets: list[TensorInfo], deviation: float, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    for info in targets:
        if len(info.shape) == 1:
            yield info.name, np.ones(info.shape, np.float32)
        else:
            yield info.name, generator.standard_normal(info.shape, dtype=np.float32) * np.float32(deviation)


def _check_tokenizer(path: Path, spec: ModelSpec) -> None:
    tokenizer = SentencePieceTokenizer(path)
    problems = Problems(f"tokenizer {path} and the model")
    if tokenizer.vocab_size > spec.vocab_size:
        problems.add(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model vocab_size={spec.vocab_size}",
            f"set vocab_size to at least {tokenizer.vocab_size}",
        )
    for ours, theirs in (("bos_token_id", "bos_id"), ("eos_token_id", "eos_id"), ("pad_token_id", "pad_id")):
        if getattr(spec, ours) != tokenizer.special_ids[theirs]:
            problems.add(
                f"{ours}={getattr(spec, ours)}, the tokenizer's {theirs} is {tokenizer.special_ids[theirs]}",
                "make them equal",
            )
    problems.raise_if_any()


def _tokenizer_config(spec: ModelSpec) -> dict[str, Any]:
    """As the published Mixtral folders: ``legacy`` keeps SentencePiece's own treatment of leading blanks."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>" if spec.pad_token_id >= 0 else None,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position_embeddings,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
