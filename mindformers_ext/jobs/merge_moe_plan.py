# SPDX-License-Identifier: Apache-2.0
"""The plan of a mixture: every tensor of the Mixtral written, and where it comes from; its config.json."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems
from mindformers_ext.core.hf_config import ARCHITECTURES, DEFAULTS
from mindformers_ext.formats.dtypes import FLOATS, SHORT_NAMES, is_float
from mindformers_ext.formats.tensors import TensorInfo
from mindformers_ext.jobs.merge_models import Model
from mindformers_ext.jobs.merge_moe_config import Expert, MoEConfig
from mindformers_ext.jobs.merge_sidecars import with_both_ropes
from mindformers_ext.surgery.merge.architectures import known_names

FITTING = ("llama", "mistral")  # models whose attention and feed-forward are those of a Mixtral
W1, W2, W3 = "gate_proj", "down_proj", "up_proj"
WHY_NOT = {
    "phi3": "its attention and feed-forward are stored and sized differently, so its experts fit no other model",
    "qwen2": "its attention has biases, and a Mixtral has none",
    "mixtral": "it is a mixture already",
}


@dataclass(frozen=True)
class CopyFrom:
    """A matrix of a model, with ``noise`` of that deviation added and then times ``scale``."""

    model: str
    name: str
    noise: float = 0.0
    scale: float = 1.0
    stream: int = 0  # of the random numbers


@dataclass(frozen=True)
class Gate:
    """The router's rows of a layer."""

    layer: int


@dataclass(frozen=True)
class Target:
    """A tensor to write: its sources one after the other, along the first axis (or two of a fused tensor)."""

    info: TensorInfo
    sources: tuple[CopyFrom | Gate, ...]


def plan_targets(
    config: MoEConfig, models: Mapping[str, Model], fused: bool, problems: Problems
) -> tuple[list[Target], list[str]]:
    """Every tensor in file order and notes; what does not fit goes to ``problems``."""
    base = models[config.base_model]
    for model in models.values():
        _check_kind(model, base, problems)
    if problems.lines:
        return [], []
    wanted = config.dtype or SHORT_NAMES.get(str(base.config.get("torch_dtype")), str(base.config.get("torch_dtype")))
    embedding = base.reader.infos.get("model.embed_tokens.weight")
    dtype = FLOATS.get(wanted) or (embedding.dtype if embedding else np.dtype(np.float32))
    builder = _Builder(config, models, dtype, problems)
    targets = builder.run(fused)
    known = known_names(base.architecture, base.layers)
    extra = [name for name in base.reader.infos if name not in known]
    notes = [f"'{base.name}' has tensors that a Mixtral does not have, left behind: {extra[0]}"
             + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")] if extra else []  # fmt: skip
    if len(config.experts) & (len(config.experts) - 1):
        notes.append(f"{len(config.experts)} experts are no power of two: llama.cpp may refuse the model")
    return targets, notes


def _check_kind(model: Model, base: Model, problems: Problems) -> None:
    kind = model.architecture.model_type
    if kind not in FITTING:
        problems.add(
            f"'{model.name}' is a {model.architecture.classes[0]}: {WHY_NOT.get(kind, 'it fits no Mixtral')}",
            "take LLaMA or Mistral models of one size as base and experts (two fine-tuned Llama-3-8B, for example)",
        )
    for key in ("attention_bias", "mlp_bias"):
        if model.config.get(key):
            problems.add(
                f"'{model.name}' has {key}", "a Mixtral has no biases, they would be lost: take models without"
            )
    activations = ("silu", "swish", None)
    if model.config.get("hidden_act") not in activations:
        problems.add(
            f"'{model.name}' has hidden_act {model.config['hidden_act']!r}", "the experts are computed with silu"
        )
    if model.layers != base.layers:
        problems.add(
            f"'{model.name}' has {model.layers} layers, the base {base.layers}", "all models need equally many"
        )


class _Builder:
    """Makes the targets."""

    def __init__(
        self, config: MoEConfig, models: Mapping[str, Model], dtype: np.dtype[Any], problems: Problems
    ) -> None:  # fmt: skip
        self.config, self.models, self.dtype, self.problems = config, models, dtype, problems
        self.base = models[config.base_model]
        self.targets: list[Target] = []

    def run(self, fused: bool) -> list[Target]:
        table = self.base.architecture
        for row in table.pre:
            self._from_base(row.name, row.optional)
        rows = [row for row in table.layer_rows() if ".mlp." not in row.name and not row.name.endswith(".bias")]
        for layer in range(self.base.layers):
            for row in rows:
                self._from_base(row.name.replace("{i}", str(layer)), row.optional)
            self._moe(layer, fused)
        for row in table.post:
            tied = bool(self.base.config.get("tie_word_embeddings", False))
            self._from_base(row.name, row.optional and (tied or row.name != "lm_head.weight"))
        return self.targets

    def _from_base(self, name: str, optional: bool) -> None:
        info = self.base.reader.infos.get(name)
        if info is None and not optional:
            self.problems.add(f"'{name}' is missing in '{self.base.name}'", "copy the whole model again")
        elif info is not None and is_float(info.dtype):
            self._append(name, info.shape, CopyFrom(self.base.name, name))
        elif info is not None:
            self.problems.add(f"'{name}' of '{self.base.name}' is {info.dtype}", "only floats are assembled")

    def _append(self, name: str, shape: tuple[int, ...], *sources: CopyFrom | Gate) -> None:
        self.targets.append(Target(TensorInfo(name, shape, self.dtype), sources))

    def _moe(self, layer: int, fused: bool) -> None:
        old = f"model.layers.{layer}.mlp."
        count, hidden = len(self.config.experts), int(self.base.config["hidden_size"])
        width = int(self.base.config["intermediate_size"])
        shapes = {W1: (width, hidden), W2: (hidden, width), W3: (width, hidden)}
        found = {(place, kind): self._expert(expert, place, f"{old}{kind}.weight", shapes[kind])
                 for place, expert in enumerate(self.config.experts) for kind in (W1, W2, W3)}  # fmt: skip
        if fused:
            self._append(old + "gate.weight", (count, hidden), Gate(layer))
            both = tuple(found[place, kind] for place in range(count) for kind in (W1, W3))
            self._append(old + "experts.gate_up_proj", (count, 2 * width, hidden), *both)
            downs = tuple(found[place, W2] for place in range(count))
            self._append(old + "experts.down_proj", (count, hidden, width), *downs)
            return
        new = f"model.layers.{layer}.block_sparse_moe."
        self._append(new + "gate.weight", (count, hidden), Gate(layer))
        for place in range(count):
            for short, kind in (("w1", W1), ("w2", W2), ("w3", W3)):
                self._append(f"{new}experts.{place}.{short}.weight", shapes[kind], found[place, kind])

    def _expert(self, expert: Expert, place: int, name: str, shape: tuple[int, ...]) -> CopyFrom:
        info = self.models[expert.model].reader.infos.get(name)
        if info is None:
            self.problems.add(f"'{name}' is missing in '{expert.model}'", "copy the whole model again")
        elif info.shape != shape:
            self.problems.add(f"'{name}' of '{expert.model}' is {list(info.shape)}, the base has {list(shape)}",
                              "experts need the sizes of the base")  # fmt: skip
        elif not is_float(info.dtype):
            self.problems.add(f"'{name}' of '{expert.model}' is {info.dtype}", "only floats are assembled")
        scale = expert.residual_scale if name.endswith(f"{W2}.weight") else None
        stream = zlib.crc32(f"{place} {name}".encode())
        return CopyFrom(expert.model, name, expert.noise_scale or 0.0, 1.0 if scale is None else scale, stream)


def mixtral_config(base: Mapping[str, Any], experts: int, chosen: int, *, dtype: str, tied: bool) -> dict[str, Any]:
    """config.json of the mixture. Everything that Mixtral's defaults would change is written out."""
    kind = str(base.get("model_type"))
    full = with_both_ropes({**DEFAULTS[kind], **base})
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
            "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id"
    )  # fmt: skip
    result: dict[str, Any] = {"architectures": [ARCHITECTURES["mixtral"]], "model_type": "mixtral"}
    result |= {key: full.get(key) for key in keys}
    heads = result["num_attention_heads"]
    result["num_key_value_heads"] = result["num_key_value_heads"] or heads
    result["head_dim"] = result["head_dim"] or result["hidden_size"] // heads
    return result | {
        "hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None, "tie_word_embeddings": tied,
        "num_local_experts": experts, "num_experts_per_tok": chosen, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": dtype, "use_cache": True,
    }  # fmt: skip
