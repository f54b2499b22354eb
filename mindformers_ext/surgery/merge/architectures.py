# SPDX-License-Identifier: Apache-2.0
"""Which tensors a Hugging Face model has, as tables of rows; the plan of a merge is made from them.

``{i}`` is the layer, ``{e}`` the expert. A row may be optional (stored by some models only); ``tied`` names the tensor
that stands in for it where a model ties the two; ``vocab`` rows have one row per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.errors import UserError

PRE, LAYER, POST = "pre", "layer", "post"


@dataclass(frozen=True)
class Row:
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
    layer: tuple[Row, ...]
    pre: tuple[Row, ...]
    post: tuple[Row, ...]
    experts: int = 0

    def layer_rows(self) -> Iterator[Row]:
        """The rows of a layer, one per expert where they have experts; ``{i}`` stays open."""
        for row in self.layer:
            if "{e}" in row.name:
                yield from (Row(row.name.replace("{e}", str(e)), row.optional) for e in range(self.experts))
            else:
                yield row


EMBEDDING = Row("model.embed_tokens.weight", vocab=True)
NORM = Row("model.norm.weight")
HEAD = Row("lm_head.weight", optional=True, tied="model.embed_tokens.weight", vocab=True)
_L = "model.layers.{i}."


def _rows(text: str, optional: bool = False) -> tuple[Row, ...]:
    return tuple(Row(_L + name, optional) for name in text.split())


NORMS = _rows("input_layernorm.weight post_attention_layernorm.weight")
PROJECTIONS = _rows("self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight")
BIASES = _rows("self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias")
DENSE = _rows("mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight")
# with attention_bias or mlp_bias of LlamaConfig
LLAMA_BIASES = (
    *_rows("self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias self_attn.o_proj.bias", True),
    *_rows("mlp.gate_proj.bias mlp.up_proj.bias mlp.down_proj.bias", True),
)
MIXTRAL = _rows(
    "block_sparse_moe.gate.weight block_sparse_moe.experts.{e}.w1.weight "
    "block_sparse_moe.experts.{e}.w2.weight block_sparse_moe.experts.{e}.w3.weight"
)


def _model(model_type: str, name: str, *layer: Row) -> Architecture:
    return Architecture(model_type, (name,), layer, (EMBEDDING,), (NORM, HEAD))


TABLE = (
    _model("llama", "LlamaForCausalLM", *NORMS, *PROJECTIONS, *DENSE, *LLAMA_BIASES),
    _model("mistral", "MistralForCausalLM", *NORMS, *PROJECTIONS, *DENSE),
    _model("qwen2", "Qwen2ForCausalLM", *NORMS, *PROJECTIONS, *BIASES, *DENSE),
    _model("mixtral", "MixtralForCausalLM", *NORMS, *PROJECTIONS, *MIXTRAL),
    _model(
        "phi3",
        "Phi3ForCausalLM",
        *NORMS,
        *_rows("self_attn.qkv_proj.weight self_attn.o_proj.weight mlp.gate_up_proj.weight mlp.down_proj.weight"),
    ),
)


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table of the model that ``config`` (of config.json) describes; an unknown one is a ``UserError``."""
    classes = config.get("architectures") or []
    for entry in TABLE:
        if set(entry.classes) & set(classes) or (not classes and config.get("model_type") == entry.model_type):
            experts = int(config.get("num_local_experts", 8)) if entry.model_type == "mixtral" else 0
            return Architecture(entry.model_type, entry.classes, entry.layer, entry.pre, entry.post, experts)
    raise UserError(
        f"'{where}' is a {classes or config.get('model_type')}: models merged here are "
        + ", ".join(name for entry in TABLE for name in entry.classes)
    )


def known_names(architecture: Architecture, layers: int) -> Collection[str]:
    """Every name that the table explains for a model of ``layers`` layers."""
    names = {row.name for row in (*architecture.pre, *architecture.post)}
    return names | {row.name.replace("{i}", str(i)) for row in architecture.layer_rows() for i in range(layers)}
