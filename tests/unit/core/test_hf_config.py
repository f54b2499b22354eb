# SPDX-License-Identifier: Apache-2.0
"""Hugging Face config.json <-> ModelSpec: real files' keys, both spellings, round trip, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from mindformers_ext.core.config.hf import hf_config_from_spec, hf_notes, model_spec_from_hf, routing_as_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec
from tests.helpers.specs import model_specs

# the keys and values of the published Mixtral-8x7B file
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        model_spec_from_hf(config)
    return str(caught.value)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_mixtral() -> None:
    spec = model_spec_from_hf(MIXTRAL)
    assert (spec.model_type, spec.head_dim, spec.num_key_value_heads, spec.rope_theta) == ("mixtral", 128, 8, 1e6)
    assert (spec.max_position_embeddings, spec.pad_token_id, spec.tie_word_embeddings) == (32768, -1, False)
    assert spec.moe == MoESpec(
        num_local_experts=8,
        num_experts_per_tok=2,
        capacity_factor=0.0,
        aux_losses=(("expert", 0.04),),
        aux_loss_reduce="mean",
    )


def test_llama_and_windowless_mistral_are_the_same_model() -> None:
    spec = model_spec_from_hf(LLAMA)
    assert (spec.model_type, spec.moe, spec.head_dim, spec.intermediate_size) == ("llama", None, 128, 11008)
    assert model_spec_from_hf(MISTRAL) == spec
    assert model_spec_from_hf(MISTRAL | {"sliding_window": 4096}) == spec  # as wide as the positions
    assert hf_config_from_spec(spec)["architectures"] == ["LlamaForCausalLM"]


def test_defaults_by_model_type() -> None:
    bare = {"model_type": "llama"}
    assert model_spec_from_hf(bare).num_key_value_heads == 32
    assert model_spec_from_hf({"model_type": "mixtral"}).num_key_value_heads == 8
    assert model_spec_from_hf({"model_type": "mixtral", "num_key_value_heads": None}).num_key_value_heads == 32
    assert (model_spec_from_hf(bare).rms_norm_eps, model_spec_from_hf({"model_type": "mixtral"}).rms_norm_eps) == (
        1e-6,
        1e-5,
    )
    assert model_spec_from_hf({"architectures": ["MixtralForCausalLM"]}).moe is not None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_both_spellings_of_theta(rope: dict[str, Any]) -> None:
    assert model_spec_from_hf(without(MIXTRAL, "rope_theta") | rope).rope_theta == 5e5


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        ({}, []),
        ({"sliding_window": None, "unsloth_version": "1"}, []),
        ({"pretraining_tp": 2}, ["config.json: pretraining_tp=2 has no effect here: the same sums in another order"]),
        (
            {"neftune_noise_alpha": 5, "sliding_window": 8, "max_window_layers": 1},  # a llama has no window
            ["config.json: not read, as by transformers: neftune_noise_alpha, sliding_window, max_window_layers"],
        ),
    ],
)
def test_what_changes_nothing_is_noted(more: dict[str, Any], notes: list[str]) -> None:
    assert hf_notes(LLAMA | more) == notes
    assert model_spec_from_hf(LLAMA | more) == model_spec_from_hf(LLAMA)


def test_token_ids() -> None:
    spec = model_spec_from_hf(LLAMA | {"eos_token_id": [5, 6], "bos_token_id": None, "pad_token_id": 0})
    assert (spec.eos_token_id, spec.more_eos_token_ids, spec.bos_token_id, spec.pad_token_id) == (5, (6,), -1, 0)
    config = hf_config_from_spec(spec)
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([5, 6], None, 0)


def test_head_dim_is_optional_and_free() -> None:
    assert model_spec_from_hf(MIXTRAL | {"head_dim": None}).head_dim == 128
    assert model_spec_from_hf(MIXTRAL | {"head_dim": 64}).head_dim == 64
    assert "hidden_size=4096 is not a multiple of num_attention_heads=24" in refusal(
        MIXTRAL | {"num_attention_heads": 24}
    )


@settings(max_examples=80, deadline=None)
@given(model_specs())
def test_round_trip(spec: ModelSpec) -> None:
    if spec.moe:
        spec = replace(
            spec,
            moe=replace(
                spec.moe,
                use_gating_sigmoid=False,
                norm_topk_prob=True,
                topk_method="greedy",
                routed_scaling_factor=1.0,
                balance_via_topk_bias=False,
                norm_single_choice=spec.moe.num_experts_per_tok == 1,
            ),
        )
        factors = tuple((kind, factor / 4) for kind, factor in spec.moe.aux_losses)
        spec = replace(spec, moe=replace(spec.moe, aux_losses=factors))
    if spec.eos_token_id < 0:
        spec = replace(spec, more_eos_token_ids=())  # no end of text, so no further ones
    config = json.loads(json.dumps(hf_config_from_spec(spec)))
    expected = replace(spec, ignore_token_id=-100, moe=routing_as_hf(spec.moe) if spec.moe else None)
    assert model_spec_from_hf(config) == expected
    assert hf_config_from_spec(model_spec_from_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_gating_sigmoid": True}, "use_gating_sigmoid=True"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        ({"num_experts_per_tok": 1}, "norm_single_choice=False"),  # transformers' gate of one choice is 1, not p
    ],
)
def test_what_transformers_does_not_compute_is_not_written(change: dict[str, Any], word: str) -> None:
    spec = model_spec_from_hf(MIXTRAL)
    assert spec.moe is not None
    with pytest.raises(UserError, match=word):
        hf_config_from_spec(replace(spec, moe=replace(spec.moe, **change)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MIXTRAL | {"num_expert_per_tok": 2},
            ["unknown key 'num_expert_per_tok'", "did you mean 'num_experts_per_tok'?"],
        ),
        (LLAMA | {"num_local_experts": 8}, ["unknown key 'num_local_experts'"]),
        (LLAMA | {"rope_scaling": {"type": "mrope", "factor": 2.0}}, ["rope_type='mrope' is not built", "linear, dyn"]),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, ["rope_scaling of rope_type linear lacks factor"]),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fest": 1}}, ["did you mean 'beta_fast'?"]),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["lacks low_freq_factor"]),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor=0.5", "use 1 or more"]),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["differ"]),
        (MIXTRAL | {"attention_bias": True}, ["attention_bias=True is not built"]),
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act='gelu' is not built", "'silu'"]),
        (MIXTRAL | {"quantization_config": {"bits": 4}}, ["quantization_config="]),
        (MIXTRAL | {"layer_types": ["sliding_attention"]}, ["layer_types="]),
        (MIXTRAL | {"model_type": "gpt_neox"}, ["model_type='gpt_neox'", "known: llama, mistral"]),
        (MIXTRAL | {"architectures": ["MixtralForTokenClassification"]}, ["only MixtralForCausalLM is converted"]),
        (MIXTRAL | {"num_experts_per_tok": 9}, ["num_experts_chosen=9 exceeds expert_num=8"]),
        (MIXTRAL | {"hidden_size": "4096"}, ["hidden_size='4096' is not a whole number"]),
        (MIXTRAL | {"eos_token_id": []}, ["eos_token_id=[]"]),
        ({}, ["model_type=None"]),
    ],
)
def test_refusals(config: dict[str, Any], words: list[str]) -> None:
    text = refusal(config)
    for word in words:
        assert word in text
