# SPDX-License-Identifier: Apache-2.0
"""Which tensors a Hugging Face model has, as tables of rows; the plan of a merge is made from them.

Names that a conversion knows come from its tables (``weights.llama``, ``weights.mixtral``). ``{layer}`` is the layer,
``{expert}`` the expert. A row may be optional (stored by some models only); ``tied`` names the tensor that stands in
for it where a model ties the two; ``vocab`` rows have one row per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA, MISTRAL, MIXTRAL, Family
from mindformers_ext.weights import llama, mixtral
from mindformers_ext.weights.rules import Rule


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a model, or one per layer (and expert)."""

    name: str
    optional: bool = False
    tied: str | None = None
    vocab: bool = False


@dataclass(frozen=True)
class Architecture:
    """The tensors of one kind of model. ``classes`` are the names in config.json's ``architectures``."""

    model_type: str
    classes: tuple[str, ...]
    layer: tuple[TensorRow, ...]
    pre: tuple[TensorRow, ...]
    post: tuple[TensorRow, ...]
    experts: int = 0

    def layer_rows(self) -> Iterator[TensorRow]:
        """The rows of a layer, one per expert where they have experts; ``{layer}`` stays open."""
        for row in self.layer:
            if "{expert}" in row.name:
                yield from (TensorRow(row.name.replace("{expert}", str(e)), row.optional) for e in range(self.experts))
            else:
                yield row


def _rows(*rules: Rule) -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name) for rule in rules for name, _ in rule.hf_templates)


def _biases(rows: tuple[TensorRow, ...], *words: str, optional: bool = False) -> tuple[TensorRow, ...]:
    """The biases of those ``rows`` whose names hold one of ``words``."""
    stems = [row.name.removesuffix("weight") for row in rows if any(word in row.name for word in words)]
    return tuple(TensorRow(stem + "bias", optional) for stem in stems)


EMBEDDING = replace(*_rows(llama.EMBEDDING), vocab=True)
(NORM,) = _rows(llama.FINAL_NORM)
HEAD = replace(*_rows(llama.HEAD), optional=True, tied=EMBEDDING.name, vocab=True)
ATTENTION = _rows(*llama.ATTENTION)  # with the layer's norms
DENSE = _rows(*llama.FEED_FORWARD)
EXPERTS = _rows(*mixtral.PER_EXPERT)
BIASES = _biases(ATTENTION, "q_proj", "k_proj", "v_proj")
LLAMA_BIASES = _biases((*ATTENTION, *DENSE), "_proj", optional=True)  # with attention_bias or mlp_bias of LlamaConfig
_PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
PHI3 = tuple(TensorRow(f"model.layers.{{layer}}.{name}.weight") for name in _PHI3)


def _model(model_type: str, name: str, *layer: TensorRow) -> Architecture:
    return Architecture(model_type, (name,), layer, (EMBEDDING,), (NORM, HEAD))


def _family(family: Family, *layer: TensorRow) -> Architecture:
    return _model(family.name, family.hf_class, *layer)


TABLE = (
    _family(LLAMA, *ATTENTION, *DENSE, *LLAMA_BIASES),
    _family(MISTRAL, *ATTENTION, *DENSE),
    _model("qwen2", "Qwen2ForCausalLM", *ATTENTION, *BIASES, *DENSE),
    _family(MIXTRAL, *ATTENTION, *EXPERTS),
    _model("phi3", "Phi3ForCausalLM", *(row for row in ATTENTION if "norm" in row.name), *PHI3),
)


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table of the model that ``config`` (of config.json) describes; an unknown one is a ``UserError``."""
    classes = config.get("architectures") or []
    for entry in TABLE:
        if set(entry.classes) & set(classes) or (not classes and config.get("model_type") == entry.model_type):
            experts = int(config.get("num_local_experts", 8)) if entry.model_type == MIXTRAL.name else 0
            return Architecture(entry.model_type, entry.classes, entry.layer, entry.pre, entry.post, experts)
    raise UserError(
        f"'{where}' is a {classes or config.get('model_type')}: models merged here are "
        + ", ".join(name for entry in TABLE for name in entry.classes)
    )


def known_names(architecture: Architecture, layers: int) -> Collection[str]:
    """Every name that the table explains for a model of ``layers`` layers."""
    names = {row.name for row in (*architecture.pre, *architecture.post)}
    return names | {row.name.replace("{layer}", str(i)) for row in architecture.layer_rows() for i in range(layers)}
