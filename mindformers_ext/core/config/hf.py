# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face ``config.json`` seen as a ``ModelSpec`` and back; families differ by their rows in ``core.families``.

Defaults are those of transformers 4.57's configuration classes.

The routing loss: Hugging Face's ``router_aux_loss_coef`` weighs E * sum_i f_i P_i with f summing to k, ours (as
MindFormers') has f summing to 1. For one layer theirs is exactly k times ours, so ``coef`` becomes
``(("expert", coef * k),)`` and ``aux_loss_reduce`` "mean", because theirs is taken once over the tokens of all layers.
Over several layers the two differ (a product of means is not the mean of products) but agree when layers are alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindformers_ext.core.config.hf_attention import (
    LAYER_TYPES,
    ROPE_KEYS,
    WINDOW_KEYS,
    read_rope,
    read_window,
    written_attention,
)
from mindformers_ext.core.config.hf_shared import (
    ATTENTION_KEYS,
    ROUTED_WIDTH,
    as_variant,
    read_attention_experts,
    read_ends,
    read_shared,
    read_width,
    splits_width,
    told_variant,
    written_attention_experts,
)
from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import FAMILIES, UNBALANCED_GATES, Family
from mindformers_ext.core.layers import NOISY_WORDS, MoESpec, expert_sizes_told
from mindformers_ext.core.spec import FEATURES, LARGEST, ModelSpec

# field of ModelSpec = Hugging Face's key -> kind
_COMMON: dict[str, str] = {
    "vocab_size": "int",
    "hidden_size": "int",
    "intermediate_size": "int",
    "num_hidden_layers": "int",
    "num_attention_heads": "int",
    "num_key_value_heads": "int",
    "head_dim": "int",
    "max_position_embeddings": "int",
    "rms_norm_eps": "float",
    "rope_theta": "float",
    "tie_word_embeddings": "bool",
    "initializer_range": "float",
    "bos_token_id": "int",
    "eos_token_id": "ids",
    "pad_token_id": "int",
}
_AUX_COEF = ("router_aux_loss_coef", "float", 0.001)
_STEP, _DENSE = "decoder_sparse_step", "mlp_only_layers"

# What a family computes with unless its row or a word of it says otherwise: by part and field.
_FIXED: dict[str, dict[str, Any]] = {
    "model": dict.fromkeys(FEATURES, False),
    "moe": {
        "gate": "linear",
        "intermediate_size": None,
        "use_gating_sigmoid": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "balance_via_topk_bias": False,
        "expert_bias": False,
    },
    "shared": {"gated": False, "scale": 1.0, "weighs_each": False, "num_experts": 1},
}

# Keys that would change the result and are not built: the values that leave it as it is.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None, {}),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
}
# Keys with another value than these are noted: what they change is not this function.
_DROPS = "of experts that drop tokens; here none is dropped"
_NOTED: dict[str, tuple[tuple[object, ...], str]] = {
    "drop_tokens": ((True, None), _DROPS),
    "dropped_padding": (("zero", None), _DROPS),
    "capacity_factor": ((1.25, None), _DROPS),
    "pretraining_tp": ((1, None), "the same sums in another order"),
    "attention_dropout": ((0, 0.0, None), "of training only; not built, nothing is dropped"),
    "router_jitter_noise": ((0, 0.0, None), "of training only; not built, nothing is added"),
    "use_layer_wise_balance": ((False, None), "the loss that balances experts is taken layer by layer here"),
}
_HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash use_cache
    output_router_logits output_attentions output_hidden_states return_dict torchscript auto_map
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    gradient_checkpointing id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix sep_token_id decoder_start_token_id unk_token_id pruned_heads chunk_size_feed_forward
    is_decoder cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss use_bfloat16
    bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p max_sequence_length
    unsloth_version unsloth_fixed
    base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference""".split()
)


def model_spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The model that ``config.json`` describes. A token id of null becomes -1 (no such token).

    ``enable_sdrop``, capacity and the other words that Hugging Face lacks describe the same function as
    Hugging Face's block: dropless (``capacity_factor`` 0).

    Raises:
        UserError: lists every unknown key, wrong value and feature that is not built.
    """
    problems = Problems("config.json")
    row = _family(config, problems)
    problems.raise_if_any()
    config = as_variant(config, row)
    _check_keys(config, row, problems)
    values = {
        name: read_value(name, config.get(name), reader, row.defaults[name], problems)
        for name, reader in _COMMON.items()
    }
    if values["num_hidden_layers"] > LARGEST["num_hidden_layers"]:  # layers are counted through below
        problems.positive("num_hidden_layers", values["num_hidden_layers"], LARGEST["num_hidden_layers"])
    values["rope_theta"], values["rope_scaling"] = read_rope(config, values["rope_theta"], problems)
    parts = _words(config, row, problems)
    problems.raise_if_any()
    if row.dense_width:
        values["intermediate_size"] = read_width(config, row, parts, problems)
    window, full = read_window(config, row, values["num_hidden_layers"], values["max_position_embeddings"], problems)
    values |= {"sliding_window": window, "full_attention_layers": full}
    own = FAMILIES[row.reads_as] if row.reads_as and window is None else row
    values |= {**row.model, **parts["model"], "family": "" if own.implied else own.name}
    values["moe"] = _routing(config, row, parts, values, problems) if row.has_experts else None
    values["dense_layers"] = _dense_layers(config, row, values["num_hidden_layers"], problems)
    problems.raise_if_any()
    for name in ("bos_token_id", "pad_token_id"):
        values[name] = -1 if _is_null(config, name, row.defaults[name]) else values[name]
    no_eos = _is_null(config, "eos_token_id", row.defaults["eos_token_id"])
    first, *more = (-1,) if no_eos else values["eos_token_id"]
    values |= {"eos_token_id": first, "more_eos_token_ids": tuple(more)}
    _complete_heads(config, row, values, problems)
    if row.attends_by_experts:
        values |= read_attention_experts(config, values["num_key_value_heads"], problems)
        problems.raise_if_any()
    spec = ModelSpec(**values)
    spec.collect(problems)
    problems.raise_if_any()
    return spec


def hf_config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` of ``spec``, for transformers 4.57; ``model_spec_from_hf`` reads it back.

    Training words without a Hugging Face name (capacity, drop order, router type, ...) are left out: the file describes
    the dropless model that transformers runs.

    Raises:
        UserError: where transformers would compute something else (sigmoid gating, scaled routing, ...).
    """
    row = spec.family_row
    _check_expressible(spec, row)
    known = FAMILIES[row.variant_of] if row.variant_of else row
    result: dict[str, Any] = {"architectures": [known.hf_class], "model_type": known.name, "hidden_act": "silu"}
    result |= {**row.says, **{name: getattr(spec, name) for name in _COMMON}}
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        result[name] = None if result[name] < 0 else result[name]
    if spec.more_eos_token_ids:
        result["eos_token_id"] = [spec.eos_token_id, *spec.more_eos_token_ids]
    result["attention_dropout"] = 0.0
    parts = {"model": spec, "moe": spec.moe, "shared": spec.moe.shared_expert if spec.moe else None}
    for word in row.words:
        value = getattr(parts[word.part], word.fields[0])
        is_width = (word.part, word.field) == ("moe", "intermediate_size")
        value = {ours: theirs for theirs, ours in word.means}[value] if word.means else value
        result[word.key] = spec.expert_size if is_width else _plain(value)
    if splits_width(row):
        result[ROUTED_WIDTH] = spec.routed_width
    if row.chooses_layers:
        result |= {_STEP: 1, _DENSE: list(spec.dense_layers)}
    if row.attends_by_experts:
        result |= written_attention_experts(spec)
    if row.dense_ends:
        result |= {row.dense_ends: len(spec.dense_layers) // 2, row.dense_width: spec.intermediate_size}
    if spec.moe and row.weighs_loss:
        factor = dict(spec.moe.aux_losses).get("expert", 0.0)
        result[_AUX_COEF[0]] = float(f"{factor / spec.moe.num_experts_per_tok:.15g}")
    return result | written_attention(spec, row)


def hf_notes(config: Mapping[str, Any]) -> list[str]:
    """One line per key of ``config.json`` that is set and changes nothing here, but those that say nothing of the
    function anywhere."""
    known = {*_read_keys(_family(config, Problems("config.json"))), *_NOTED, *_HARMLESS}
    notes = [
        f"config.json: {key}={config[key]!r} has no effect here: {why}"
        for key, (neutral, why) in _NOTED.items()
        if key in config and config[key] not in neutral
    ]
    unread = [key for key, value in config.items() if key not in known and value is not None]
    return notes + ([f"config.json: not read, as by transformers: {', '.join(unread)}"] if unread else [])


def routing_as_hf(moe: MoESpec) -> MoESpec:
    """What is left of ``moe`` in a ``config.json``: the part that transformers knows, dropless."""
    expert = tuple((kind, factor) for kind, factor in moe.aux_losses if kind == "expert" and factor)
    return MoESpec(
        num_local_experts=moe.num_local_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        norm_topk_prob=moe.norm_topk_prob,
        capacity_factor=0.0,
        aux_losses=expert,
        aux_loss_reduce="sum" if moe.gate in UNBALANCED_GATES else "mean",
        norm_single_choice=moe.norm_topk_prob and moe.num_experts_per_tok == 1,
        intermediate_size=moe.intermediate_size,
        gate=moe.gate,
        shared_expert=moe.shared_expert,
        expert_sizes=moe.expert_sizes,
        expert_bias=moe.expert_bias,
        aux_loss_type=moe.aux_loss_type,
        **{name: getattr(moe, name) for name in NOISY_WORDS},
    )


def _family(config: Mapping[str, Any], problems: Problems) -> Family:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, (list, tuple)) or not all(isinstance(name, str) for name in architectures):
        problems.add(f"architectures={architectures!r}", "a list of class names is expected")
        problems.raise_if_any()
    kinds = {row.name for row in FAMILIES.values() if row.hf_class in architectures}
    kind = config.get("model_type")
    if kind is None and len(kinds) == 1:
        kind = kinds.pop()
    row = FAMILIES.get(str(kind))
    if row is None:
        problems.add(f"model_type={kind!r}, architectures={architectures!r}", "known: " + ", ".join(FAMILIES))
        problems.raise_if_any()
    assert row is not None
    if architectures and row.hf_class not in architectures:
        problems.add(f"architectures={architectures!r} of model_type {kind!r}", f"only {row.hf_class} is converted")
    return told_variant(config, row)


def _check_keys(config: Mapping[str, Any], row: Family, problems: Problems) -> None:
    """transformers reads the keys that its class knows and no other, so that an unknown one changes nothing. But one
    that is nearly a known one is taken for a slip, and one that makes another family's experts belongs there."""
    experts = {word.key for other in FAMILIES.values() for word in other.words if word.part != "model"}
    root = row.variant_of or row.name
    variants = {word.key for other in FAMILIES.values() if other.variant_of == root for word in other.words}
    experts -= {*variants, ROUTED_WIDTH}  # written by the class of both, read where the variant's key tells it
    own, read = {word.key for word in row.words}, _read_keys(row)
    for key, value in config.items():
        if key not in read and key not in _HARMLESS and key not in _NOTED:
            slip = difflib.get_close_matches(key, sorted(read), 1, 0.9)
            if slip:
                problems.add(f"unknown key '{key}'", f"did you mean '{slip[0]}'?")
            elif key in experts:
                problems.add(f"unknown key '{key}'", f"a {row.name} has no such experts: correct model_type")
        elif key in row.says and value not in (row.says[key], None):
            problems.add(f"{key}={value!r} is not built", f"only {row.says[key]!r} is")
        elif key in _NEUTRAL and key not in own and value not in _NEUTRAL[key]:
            problems.add(f"{key}={value!r} is not built", f"only {_NEUTRAL[key][0]!r} is")


def _read_keys(row: Family) -> set[str]:
    """The keys of ``config.json`` that a family computes with."""
    read = {*_COMMON, *_NEUTRAL, *ROPE_KEYS, *row.says, LAYER_TYPES, *(word.key for word in row.words)}
    if row.windowed or row.window_switch:
        read |= set(WINDOW_KEYS)
    if splits_width(row):
        read.add(ROUTED_WIDTH)
    if row.has_experts and row.weighs_loss:
        read |= {_AUX_COEF[0]}
    read |= {row.dense_ends, row.dense_width, *(ATTENTION_KEYS if row.attends_by_experts else ())} - {""}
    return read | ({_STEP, _DENSE} if row.chooses_layers else set())


def _words(config: Mapping[str, Any], row: Family, problems: Problems) -> dict[str, dict[str, Any]]:
    """Values of the family's own words, by part and field."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "moe": {}, "shared": {}}
    for word in row.words:
        value = read_value(word.key, config.get(word.key), word.kind, word.default, problems)
        if word.means:
            problems.one_of(word.key, value, [theirs for theirs, _ in word.means])
            value = dict(word.means).get(value)
        parts[word.part] |= dict.fromkeys(word.fields, value)
    return parts


def _dense_layers(config: Mapping[str, Any], row: Family, layers: int, problems: Problems) -> tuple[int, ...]:
    """Layers without experts: transformers' rule ``index in mlp_only_layers or (index + 1) % decoder_sparse_step``."""
    if row.dense_ends:
        return read_ends(config, row, layers, problems)
    if not row.chooses_layers:
        return ()
    step = read_value(_STEP, config.get(_STEP), "int", 1, problems)
    listed = config.get(_DENSE) or []
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, int) and 0 <= item for item in listed):
        problems.add(f"{_DENSE}={listed!r}", "a list of layer numbers from 0 is expected")
        return ()
    if step < 1:
        problems.add(f"{_STEP}={step}", "1 (every layer a mixture) or more is expected")
        return ()
    return tuple(index for index in range(max(layers, 0)) if index in listed or (index + 1) % step)


def _complete_heads(config: Mapping[str, Any], row: Family, values: dict[str, Any], problems: Problems) -> None:
    """What null means for the heads."""
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if _is_null(config, "num_key_value_heads", row.defaults["num_key_value_heads"]):
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        if heads > 0:
            problems.divides("hidden_size", hidden, "num_attention_heads", heads)
        values["head_dim"] = hidden // max(1, heads)


def _check_expressible(spec: ModelSpec, row: Family) -> None:
    """``UserError`` where the family's ``config.json`` cannot say what ``spec`` is."""
    problems = Problems(f"this network as a Hugging Face {row.name}")
    shared = spec.moe.shared_expert if spec.moe else None
    told = {(word.part, name) for word in row.words for name in word.fields}
    rows = {"model": (spec, row.model), "moe": (spec.moe, row.moe), "shared": (shared, row.shared or {})}
    for part, (values, fixed) in rows.items():
        if values is None:
            continue
        wanted_of = {**_FIXED[part], **fixed}
        if part == "moe" and spec.routing.num_experts_per_tok == 1:
            wanted_of["norm_single_choice"] = spec.routing.norm_topk_prob  # transformers divides by the chosen's sum
        for name, wanted in wanted_of.items():
            if (part, name) not in told and getattr(values, name) != wanted:
                problems.add(f"{name}={getattr(values, name)!r}", f"transformers computes with {wanted!r} only")
    if (shared is not None) != (row.shared is not None):
        has = "has one" if row.shared is not None else "has none"
        problems.add(f"shared_expert={shared!r}", f"a {row.name} {has}")
    for word in row.words:  # one key for several
        values = rows[word.part][0]
        if values is not None and len({getattr(values, name) for name in word.fields}) > 1:
            said = ", ".join(f"{name}={getattr(values, name)!r}" for name in word.fields)
            problems.add(said, f"a {row.name} has one word for both, {word.key}")
    if spec.dense_layers and not (row.chooses_layers or row.dense_ends):
        problems.add(f"dense_layers={list(spec.dense_layers)}", f"every layer of a {row.name} is a mixture")
    problems.raise_if_any()


def _plain(value: Any) -> Any:
    """Tuples as the lists of JSON."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _is_null(config: Mapping[str, Any], name: str, default: Any) -> bool:
    return config.get(name, default) is None


def _routing(
    config: Mapping[str, Any],
    row: Family,
    parts: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    problems: Problems,
) -> MoESpec:
    fields = {**row.moe, **parts["moe"]}
    if not (fields.get("routed_scaling_factor", 1.0) or 0) > 0:
        (word,) = (word.key for word in row.words if word.field == "routed_scaling_factor")
        given = "missing" if config.get(word) is None else config[word]
        problems.add(f"{word} is {given}", "give what the sum of the chosen experts is multiplied by, above 0")
    problems.raise_if_any()
    if row.shared is not None:
        fields["shared_expert"] = read_shared(config, row, parts["shared"], model, problems)
        problems.raise_if_any()
    if fields.get("intermediate_size") == model["intermediate_size"]:
        fields["intermediate_size"] = None  # one width for all: one way to say it
    fields |= {"capacity_factor": 0.0, **expert_sizes_told(fields, model)}
    if not row.weighs_loss:
        return MoESpec(**fields)
    key, kind, default = _AUX_COEF
    coef = read_value(key, config.get(key), kind, default, problems)
    factor = float(f"{coef * fields['num_experts_per_tok']:.12g}")  # so that / k * k gives the factor back
    moe = MoESpec(**fields, aux_losses=(("expert", factor),) if factor else ())
    single = moe.norm_topk_prob and moe.num_experts_per_tok == 1
    return replace(moe, aux_loss_reduce="mean", norm_single_choice=single)
