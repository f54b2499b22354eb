# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face ``config.json`` seen as a ``ModelSpec`` and back, for mixtral, llama and mistral.

Defaults are those of transformers 4.57's MixtralConfig, LlamaConfig and MistralConfig. A mistral without a sliding
window is a llama in every tensor and formula, and reads as one.

The routing loss: Hugging Face's ``router_aux_loss_coef`` weighs E * sum_i f_i P_i with f summing to k, ours (as
MindFormers') has f summing to 1. For one layer theirs is exactly k times ours, so ``coef`` becomes
``(("expert", coef * k),)`` and ``aux_loss_reduce`` "mean", because theirs is taken once over the tokens of all layers.
Over several layers the two differ (a product of means is not the mean of products) but agree when layers are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems, nearest
from mindformers_ext.core.spec import ModelSpec, MoESpec

# field of ModelSpec = Hugging Face's key -> kind and default by model_type; None: derived below
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
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MISTRAL: dict[str, Any] = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_MIXTRAL: dict[str, Any] = {**_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
DEFAULTS: dict[str, dict[str, Any]] = {"llama": _LLAMA, "mistral": _MISTRAL, "mixtral": _MIXTRAL}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}

# field of MoESpec -> Hugging Face's key, kind, default
_ROUTING: dict[str, tuple[str, str, Any]] = {
    "num_local_experts": ("num_local_experts", "int", 8),
    "num_experts_per_tok": ("num_experts_per_tok", "int", 2),
}
_AUX_COEF = ("router_aux_loss_coef", "float", 0.001)

# Keys that would change the result and are not built: the values that leave it as it is.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "rope_scaling": (None, {}),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),  # sliced matmuls of old checkpoints: the same sums in another order
    "attention_dropout": (0, 0.0, None),
    "router_jitter_noise": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None, {}),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "layer_types": (None,),
}
_HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash use_cache
    output_router_logits output_attentions output_hidden_states return_dict torchscript auto_map sliding_window
    rope_parameters attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    gradient_checkpointing id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix sep_token_id decoder_start_token_id unk_token_id pruned_heads chunk_size_feed_forward
    is_decoder cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss use_bfloat16
    bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p max_sequence_length
    unsloth_version unsloth_fixed base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference""".split()
)


def model_spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The model that ``config.json`` describes. A token id of null becomes -1 (no such token).

    ``enable_sdrop``, capacity and the other words that Hugging Face lacks describe the same function as
    Hugging Face's block: dropless (``capacity_factor`` 0), probabilities normalised over the chosen.

    Raises:
        UserError: lists every unknown key, wrong value and feature that is not built.
    """
    problems = Problems("config.json")
    kind = _model_type(config, problems)
    problems.raise_if_any()
    _check_keys(config, kind, problems)
    values = {
        name: read_value(name, config.get(name), reader, DEFAULTS[kind][name], problems)
        for name, reader in _COMMON.items()
    }
    values["rope_theta"] = _rope_theta(config, values["rope_theta"], problems)
    values["moe"] = _routing(config, problems) if kind == "mixtral" else None
    problems.raise_if_any()
    for name in ("bos_token_id", "pad_token_id"):
        values[name] = -1 if _is_null(config, name, DEFAULTS[kind][name]) else values[name]
    first, *more = (-1,) if _is_null(config, "eos_token_id", 2) else values["eos_token_id"]
    values |= {"eos_token_id": first, "more_eos_token_ids": tuple(more)}
    heads = values["num_attention_heads"]
    if _is_null(config, "num_key_value_heads", DEFAULTS[kind]["num_key_value_heads"]):
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        if heads > 0:
            problems.divides("hidden_size", values["hidden_size"], "num_attention_heads", heads)
        values["head_dim"] = values["hidden_size"] // max(1, heads)
    _check_window(config, kind, values["max_position_embeddings"], problems)
    spec = ModelSpec(**values)
    spec.collect(problems)
    problems.raise_if_any()
    return spec


def hf_config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` of ``spec``, for transformers 4.57; ``model_spec_from_hf`` reads it back.

    Training words without a Hugging Face name (capacity, drop order, router type, ...) are left out: the file describes
    the dropless model that transformers runs.

    Raises:
        UserError: where transformers would compute something else (sigmoid gating, scaled or unnormalised routing).
    """
    kind = spec.model_type
    result: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu"}
    result |= {name: getattr(spec, name) for name in _COMMON}
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        result[name] = None if result[name] < 0 else result[name]
    if spec.more_eos_token_ids:
        result["eos_token_id"] = [spec.eos_token_id, *spec.more_eos_token_ids]
    result["attention_dropout"] = 0.0
    if not spec.moe:
        return result | {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    problems = Problems("this network as a Hugging Face mixtral")
    built = {
        "use_gating_sigmoid": False,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "balance_via_topk_bias": False,
    }
    if spec.moe.num_experts_per_tok == 1:
        built["norm_single_choice"] = True  # transformers always divides by the sum over the chosen
    for name, wanted in built.items():
        if getattr(spec.moe, name) != wanted:
            problems.add(f"{name}={getattr(spec.moe, name)!r}", f"transformers' Mixtral computes with {wanted!r} only")
    problems.raise_if_any()
    result |= {key: getattr(spec.moe, name) for name, (key, _, _) in _ROUTING.items()}
    factor = dict(spec.moe.aux_losses).get("expert", 0.0)
    coef = float(f"{factor / spec.moe.num_experts_per_tok:.15g}")
    return result | {_AUX_COEF[0]: coef, "sliding_window": None}


def routing_as_hf(moe: MoESpec) -> MoESpec:
    """What is left of ``moe`` in a ``config.json``: the part that transformers knows, dropless."""
    expert = tuple((kind, factor) for kind, factor in moe.aux_losses if kind == "expert" and factor)
    return MoESpec(
        num_local_experts=moe.num_local_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        capacity_factor=0.0,
        aux_losses=expert,
        aux_loss_reduce="mean",
        norm_single_choice=moe.num_experts_per_tok == 1,
    )


def _model_type(config: Mapping[str, Any], problems: Problems) -> str:
    architectures = config.get("architectures") or []
    kinds = {kind for kind, name in ARCHITECTURES.items() if name in architectures}
    kind = config.get("model_type")
    if kind is None and len(kinds) == 1:
        kind = kinds.pop()
    if kind not in DEFAULTS:
        problems.add(f"model_type={kind!r}, architectures={architectures!r}", "known: " + ", ".join(DEFAULTS))
    elif architectures and ARCHITECTURES[kind] not in architectures:
        problems.add(
            f"architectures={architectures!r} of model_type {kind!r}", f"only {ARCHITECTURES[kind]} is converted"
        )
    return str(kind)


def _check_keys(config: Mapping[str, Any], kind: str, problems: Problems) -> None:
    known = {*_COMMON, *_NEUTRAL, *_HARMLESS}
    if kind == "mixtral":
        known |= {key for key, _, _ in _ROUTING.values()} | {_AUX_COEF[0]}
    for key, value in config.items():
        if key not in known:
            problems.add(f"unknown key '{key}'", nearest(key, sorted(known)))
        elif key in _NEUTRAL and value not in _NEUTRAL[key]:
            if _means_nothing(key, value):
                continue
            problems.add(f"{key}={value!r} is not built", f"only {_NEUTRAL[key][0]!r} is")


def _means_nothing(key: str, value: Any) -> bool:
    """Long spellings of a neutral value."""
    if key == "layer_types":
        return isinstance(value, (list, tuple)) and set(value) == {"full_attention"}
    if key == "rope_scaling" and isinstance(value, Mapping):
        return set(value) <= {"type", "rope_type"} and set(value.values()) == {"default"}
    return False


def _is_null(config: Mapping[str, Any], name: str, default: Any) -> bool:
    return config.get(name, default) is None


def _rope_theta(config: Mapping[str, Any], theta: float, problems: Problems) -> float:
    """``rope_theta`` from the top level or from transformers 5's ``rope_parameters``."""
    rope = config.get("rope_parameters")
    if rope is None:
        return theta
    if not isinstance(rope, Mapping):
        problems.add(f"rope_parameters={rope!r}", "a mapping with rope_theta is expected")
        return theta
    for key in rope:
        if key not in ("rope_theta", "rope_type", "type") and (key, rope[key]) != ("partial_rotary_factor", 1.0):
            problems.add(f"rope_parameters.{key}={rope[key]!r} is not built", "only rope_theta is")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        problems.add(f"rope_parameters.rope_type={scaling!r} is not built", "only 'default' is")
    inner = read_value("rope_parameters.rope_theta", rope.get("rope_theta"), "float", theta, problems)
    if config.get("rope_theta") is not None and inner != theta:
        problems.add(f"rope_theta={theta} and rope_parameters.rope_theta={inner} differ", "keep one")
    return float(inner)


def _check_window(config: Mapping[str, Any], kind: str, positions: int, problems: Problems) -> None:
    """A window narrower than the positions changes attention; transformers' Mistral has one of 4096 by default."""
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    window = read_value("sliding_window", window, "int", None, problems)
    if window is not None and window < positions:
        problems.add(
            f"sliding_window={window} is smaller than max_position_embeddings={positions}",
            f"windowed attention is not built: set sliding_window to null, or max_position_embeddings to {window}",
        )


def _routing(config: Mapping[str, Any], problems: Problems) -> MoESpec | None:
    fields = {
        name: read_value(key, config.get(key), kind, default, problems)
        for name, (key, kind, default) in _ROUTING.items()
    }
    key, kind, default = _AUX_COEF
    coef = read_value(key, config.get(key), kind, default, problems)
    if problems.lines:
        return None
    factor = float(f"{coef * fields['num_experts_per_tok']:.12g}")  # so that / k * k gives the factor back
    moe = MoESpec(**fields, aux_losses=(("expert", factor),) if factor else ())
    single = moe.num_experts_per_tok == 1
    return replace(moe, capacity_factor=0.0, aux_loss_reduce="mean", norm_single_choice=single)
