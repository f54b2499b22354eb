# SPDX-License-Identifier: Apache-2.0
"""Hugging Face <-> MindSpore weights: in memory, or one tensor at a time from any reader."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import float_dtype
from mindformers_ext.formats.tensors import Array, MappingReader, TensorReader
from mindformers_ext.weights import llama
from mindformers_ext.weights.layouts import GMM, Layout, check_count
from mindformers_ext.weights.plan import Plan, make_plan
from mindformers_ext.weights.rules import Extras, Rule, RuleSet
from mindformers_ext.weights.tables import TABLES, Table
from mindformers_ext.weights.training_state import MS_TRAINING_STATE, ROUTER_STATE
from mindformers_ext.weights.transforms import Transposed


def rule_set(spec: ModelSpec, style: str = "per_expert", layout: Layout | None = None) -> RuleSet:
    """The table of ``spec``'s family at its sizes.

    Args:
        spec: the model; its family's row in ``weights.tables`` says what its mixtures are called.
        style: how Hugging Face's side spells the experts, one of the family's; no matter for a dense model.
        layout: how MindSpore's side lies; None is the dense layout of training.

    Raises:
        UserError: an unknown style, or the gmm layout of a model without experts.
    """
    layout = layout or Layout()
    table = TABLES[spec.model_type]
    if spec.moe and style not in table.mixtures:
        raise UserError(f"style '{style}' is unknown: choose one of {', '.join(table.mixtures)}")
    check_count(spec)
    gmm = layout.experts == GMM
    if gmm and not spec.moe:
        raise UserError("the gmm layout transposes experts and this model has none: leave --use_gmm out")
    plain, concat = table.dense_of.get(style, (table.dense, table.dense_concat))
    dense = concat if layout.qkv_concat else plain
    if spec.mlp_bias:
        dense += table.dense_bias_concat if layout.qkv_concat else table.dense_bias
    mixture = _transposed(table.mixtures[style]) if gmm else table.mixtures.get(style, ())
    mixture += table.gates.get(spec.moe.gate, ()) if spec.moe else ()
    if spec.moe and spec.moe.shared_expert and spec.moe.shared_expert.use_weighting:
        mixture += table.weighting
    if spec.moe and spec.moe.expert_bias:
        mixture += table.expert_bias
    tied = spec.tie_word_embeddings
    head: tuple[Rule, ...] = () if tied else (llama.HEAD,)
    return RuleSet(
        (
            llama.EMBEDDING,
            *_attention(spec, table, layout),
            *(replace(rule, layers="dense") for rule in dense),
            *(replace(rule, layers="mixture") for rule in mixture),
            llama.FINAL_NORM,
            *head,
        ),
        spec,
        hf_extras=Extras(llama.HF_BUFFERS, llama.TIED_HF if tied else ()),
        ms_extras=Extras(
            (*MS_TRAINING_STATE, *ROUTER_STATE),
            llama.TIED_MS if tied else (),
            kept=tuple(pattern for pattern, _ in ROUTER_STATE),
        ),
    )


def _attention(spec: ModelSpec, table: Table, layout: Layout) -> tuple[Rule, ...]:
    """Attention of every layer; where heads are experts in mixtures, theirs there and the plain one elsewhere."""
    plain = replace(spec, attn_experts=0).layer(0).attention
    before, *inside, behind = llama.attention(plain, layout.qkv_concat)
    if not spec.attn_experts:
        return before, *inside, behind
    if layout.qkv_concat:
        raise UserError("qkv_concat joins q, k and v and this model's are experts: leave it out")
    return (
        before,
        *(replace(rule, layers="dense") for rule in inside),
        *(replace(rule, layers="mixture") for rule in table.attention_experts),
        *(replace(rule, layers="mixture") for rule in table.attention_bias if spec.routing.expert_bias),
        behind,
    )


def _transposed(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules with what is stacked over experts turned: (E, D, M), (E, M, D), the gmm layout."""
    return tuple(
        replace(rule, transform=Transposed(rule.transform)) if _is_of_experts(rule) else rule for rule in rules
    )


def _is_of_experts(rule: Rule) -> bool:
    return "M" in str(rule.dims)


def detect_style(names: Collection[str], spec: ModelSpec) -> str:
    """The spelling that explains most of ``names``; the family's first where none does, so that the error names it."""
    if not spec.moe:
        return "per_expert"
    known = {
        style: sum(name in names for binding in rule_set(spec, style).bindings for name in binding.hf)
        for style in TABLES[spec.model_type].mixtures
    }
    return max(known, key=lambda style: known[style])


def plan_to_mindspore(
    reader: TensorReader, spec: ModelSpec, dtype: str | None = None, layout: Layout | None = None
) -> Plan:
    """A checked plan from a Hugging Face reader; ``dtype`` (fp16, bf16, fp32) casts, None keeps each tensor's type.

    Raises:
        UserError: names, shapes or types that do not fit ``spec``, all listed; no data is read.
    """
    rules = rule_set(spec, detect_style(reader.infos.keys(), spec), layout)
    return make_plan(rules, "to_ms", reader.infos, float_dtype(dtype) if dtype else None)


def plan_to_hf(
    reader: TensorReader,
    spec: ModelSpec,
    style: str = "per_expert",
    dtype: str | None = None,
    layout: Layout | None = None,
) -> Plan:
    """A checked plan from a MindSpore reader that lies in ``layout`` to Hugging Face's names in ``style``; errors as
    ``plan_to_mindspore``."""
    return make_plan(rule_set(spec, style, layout), "to_hf", reader.infos, float_dtype(dtype) if dtype else None)


def plan_relayout(
    reader: TensorReader, spec: ModelSpec, source: Layout, target: Layout, dtype: str | None = None
) -> Plan:
    """A checked plan from one MindSpore layout to another; training state stays behind. Errors as
    ``plan_to_mindspore``."""
    return make_plan(
        rule_set(spec, layout=source),
        "relayout",
        reader.infos,
        float_dtype(dtype) if dtype else None,
        rule_set(spec, layout=target),
    )


def iter_to_mindspore(
    reader: TensorReader, spec: ModelSpec, *, dtype: str | None = None, allow_overflow: bool = False
) -> Iterator[tuple[str, Array]]:
    """Yield (MindSpore name, array), one at a time; the plan is checked before this returns."""
    return plan_to_mindspore(reader, spec, dtype).run(reader, allow_overflow)


def iter_to_hf(
    reader: TensorReader,
    spec: ModelSpec,
    *,
    style: str = "per_expert",
    dtype: str | None = None,
    allow_overflow: bool = False,
) -> Iterator[tuple[str, Array]]:
    """Yield (Hugging Face name, array), one at a time; the plan is checked before this returns."""
    return plan_to_hf(reader, spec, style, dtype).run(reader, allow_overflow)


def to_mindspore(hf: Mapping[str, object], spec: ModelSpec, *, dtype: str | None = None) -> dict[str, Array]:
    """All MindSpore parameters from Hugging Face tensors (numpy or torch, by name); nothing aliases the source."""
    return dict(iter_to_mindspore(MappingReader(hf), spec, dtype=dtype))


def to_hf(
    ms: Mapping[str, object], spec: ModelSpec, style: str = "per_expert", *, dtype: str | None = None
) -> dict[str, Array]:
    """All Hugging Face tensors from MindSpore parameters; training state is dropped by rule, strangers refused."""
    return dict(iter_to_hf(MappingReader(ms), spec, style=style, dtype=dtype))
