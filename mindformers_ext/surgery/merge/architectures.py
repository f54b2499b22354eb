# SPDX-License-Identifier: Apache-2.0
"""Which tensors a Hugging Face model has, as tables of rows; the plan of a merge is made from them.

Names that a conversion knows come from its tables (``weights.llama``, ``weights.mixtral``). ``{layer}`` is the layer,
``{expert}`` the expert. A row may be optional (stored by some models only); ``tied`` names the tensor that stands in
for it where a model ties the two; ``vocab`` rows have one row per token. ``dims`` is the shape in the size letters of
``core.parameters`` ("HP+NP+NP D" is a sum), ``switch`` the key of config.json that says whether an optional row exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, Family
from mindformers_ext.weights import llama, mixtral
from mindformers_ext.weights.rules import Rule


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a model, or one per layer (and expert)."""

    name: str
    optional: bool = False
    tied: str | None = None
    vocab: bool = False
    dims: str = ""
    switch: str = ""


@dataclass(frozen=True)
class Architecture:
    """The tensors of one kind of model. ``classes`` are the names in config.json's ``architectures``.

    ``defaults``: what transformers takes where config.json is silent, for kinds that are no family here.
    ``layer_types``: the kinds of attention that its layers have in turn where config.json lists none.
    """

    model_type: str
    classes: tuple[str, ...]
    layer: tuple[TensorRow, ...]
    pre: tuple[TensorRow, ...]
    post: tuple[TensorRow, ...]
    experts: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ()

    def layer_rows(self) -> Iterator[TensorRow]:
        """The rows of a layer, one per expert where they have experts; ``{layer}`` stays open."""
        for row in self.layer:
            if "{expert}" in row.name:
                yield from (replace(row, name=row.name.replace("{expert}", str(e))) for e in range(self.experts))
            else:
                yield row


def _rows(*rules: Rule) -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name, dims=dims) for rule in rules for name, dims in rule.hf_templates)


def _biases(rows: tuple[TensorRow, ...], *words: str, switch: str = "") -> tuple[TensorRow, ...]:
    """The biases of those ``rows`` whose names hold one of ``words``; with ``switch`` only where that key is set."""
    return tuple(
        TensorRow(row.name.removesuffix("weight") + "bias", bool(switch), dims=row.dims.split()[0], switch=switch)
        for row in rows
        if any(word in row.name for word in words)
    )


def _layer(name: str, dims: str) -> TensorRow:
    return TensorRow(f"model.layers.{{layer}}.{name}.weight", dims=dims)


EMBEDDING = replace(*_rows(llama.EMBEDDING), vocab=True)
(NORM,) = _rows(llama.FINAL_NORM)
HEAD = replace(*_rows(llama.HEAD), optional=True, tied=EMBEDDING.name, vocab=True)
ATTENTION = _rows(*llama.ATTENTION)  # with the layer's norms
DENSE = _rows(*llama.FEED_FORWARD)
EXPERTS = _rows(*mixtral.PER_EXPERT)
BIASES = _biases(ATTENTION, "q_proj", "k_proj", "v_proj")
ATTENTION_BIASES = _biases(ATTENTION, "_proj", switch="attention_bias")
LLAMA_BIASES = (*ATTENTION_BIASES, *_biases(DENSE, "_proj", switch="mlp_bias"))
HEAD_NORMS = tuple(_layer(f"self_attn.{name}_norm", "P") for name in "qk")
PHI3 = (
    _layer("self_attn.qkv_proj", "HP+NP+NP D"),
    _layer("self_attn.o_proj", "D HP"),
    _layer("mlp.gate_up_proj", "F+F D"),
    _layer("mlp.down_proj", "D F"),
)
GEMMA2_NORMS = tuple(_layer(f"{name}_feedforward_layernorm", "D") for name in ("pre", "post"))
# Gemma 2's layers take turns; config.json lists them since transformers 4.53
SLIDING, FULL = "sliding_attention", "full_attention"


def _model(model_type: str, name: str, *layer: TensorRow, **more: Any) -> Architecture:
    return Architecture(model_type, (name,), layer, (EMBEDDING,), (NORM, HEAD), **more)


def _family(family: Family, *layer: TensorRow) -> Architecture:
    return _model(family.name, family.hf_class, *layer, defaults=family.defaults)


GEMMA2_DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GRANITE_DEFAULTS = dict.fromkeys(
    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
TABLE = (
    _family(LLAMA, *ATTENTION, *DENSE, *LLAMA_BIASES),
    _family(MISTRAL, *ATTENTION, *DENSE),
    _family(QWEN2, *ATTENTION, *BIASES, *DENSE),
    _family(MIXTRAL, *ATTENTION, *EXPERTS),
    _model("phi3", "Phi3ForCausalLM", *(row for row in ATTENTION if "norm" in row.name), *PHI3),
    _family(QWEN3, *ATTENTION, *HEAD_NORMS, *ATTENTION_BIASES, *DENSE),
    _model(
        "gemma2",
        "Gemma2ForCausalLM",
        *ATTENTION,
        *ATTENTION_BIASES,
        *GEMMA2_NORMS,
        *DENSE,
        defaults=GEMMA2_DEFAULTS,
        layer_types=(SLIDING, FULL),
    ),
    _model("granite", "GraniteForCausalLM", *ATTENTION, *DENSE, *LLAMA_BIASES, defaults=GRANITE_DEFAULTS),
)


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table of the model that ``config`` (of config.json) describes; an unknown one is a ``UserError``."""
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"'{where}' has architectures={classes!r}: a list of class names is expected")
    for entry in TABLE:
        if set(entry.classes) & set(classes) or (not classes and config.get("model_type") == entry.model_type):
            experts = config.get("num_local_experts", 8) if entry.model_type == MIXTRAL.name else 0
            if type(experts) is not int or experts < 0:
                raise UserError(f"'{where}' has num_local_experts={experts!r}: a whole number is expected")
            return replace(entry, experts=experts)
    raise UserError(
        f"'{where}' is a {classes or config.get('model_type')}: models merged here are "
        + ", ".join(name for entry in TABLE for name in entry.classes)
    )


def known_names(architecture: Architecture, layers: int) -> Collection[str]:
    """Every name that the table explains for a model of ``layers`` layers."""
    names = {row.name for row in (*architecture.pre, *architecture.post)}
    return names | {row.name.replace("{layer}", str(i)) for row in architecture.layer_rows() for i in range(layers)}
