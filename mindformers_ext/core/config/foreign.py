# SPDX-License-Identifier: Apache-2.0
"""A network of MindFormers' own as far as it concerns us: its sizes. What else its words ask for, MindFormers judges.

``core.config.view`` reads networks that are built here, where a word that is not built is an error. MindFormers' own
LLaMA on Ascend knows more (stretched positions, joined projections, an embedding of another type, ...): they pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import eq
from typing import Any

from mindformers_ext.core.config.keys import MODEL, TOP, UNBUILT, known_keys
from mindformers_ext.core.config.quantised import check_not_quantised
from mindformers_ext.core.config.values import section_at
from mindformers_ext.core.config.view import advice, network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, GENERIC_NAMES
from mindformers_ext.core.spec import NetworkSpec

# What the checks of data, weights and memory read of ``model.model_config``: of any network, and of a LLaMA.
OF_ANY = "type batch_size seq_length vocab_size".split()
OF_LLAMA = """hidden_size intermediate_size num_layers num_heads n_kv_heads multiple_of ffn_dim_multiplier
    ignore_token_id tie_word_embeddings compute_dtype param_init_type rotary_dtype softmax_compute_type
    layernorm_compute_type use_flash_attention pp_interleave_num""".split()
RESHAPING = (
    "qkv_has_bias",
    "qkv_concat",
    "attn_proj_has_bias",
    "use_3d_tensor_parallel",
)  # not the weights of our table
LEFT_OUT = ("pipeline_config", "context_parallel_algo")  # of the sections that describe the cluster
MANUAL = "MANUAL_PARALLEL"  # MindFormers cuts the network itself


def foreign_spec(config: Mapping[str, Any], device_num: int) -> tuple[NetworkSpec, list[str]]:
    """The sizes of MindFormers' own network, and a note for each word that nobody here knows.

    Raises:
        UserError: a size of the wrong kind, an unknown key where MindFormers refuses it too, or a quantised network.
    """
    check_not_quantised(config)
    _check_names(config)
    words, known = section_at(config, MODEL), known_keys(TOP)
    kept = {key: value for key, value in config.items() if key in known and key not in (*UNBUILT[TOP], "moe_config")}
    for section, unbuilt in UNBUILT.items():
        if isinstance(kept.get(section), Mapping):
            kept[section] = {key: kept[section][key] for key in kept[section] if key not in (*unbuilt, *LEFT_OUT)}
    if section_at(kept, "parallel").get("parallel_mode") == MANUAL:
        kept |= {"parallel": {}, "use_parallel": False}
    read = (*OF_ANY, *OF_LLAMA) if is_llama(config) else OF_ANY
    model_words = {key: value for key, value in words.items() if key in read}
    if words and not model_words:  # described in a folder of Hugging Face's
        model_words = {"type": None}
    kept["model"] = {"arch": section_at(config, "model.arch"), "model_config": model_words}
    if isinstance(words.get("parallel_config"), Mapping):
        kept.setdefault("parallel_config", words["parallel_config"])
    notes = [
        f"{where}{name} is not known here ({advice(section, name)}): MindFormers gets it as it is"
        for section, where, given in ((TOP, "", config), (MODEL, f"{MODEL}.", words if is_llama(config) else ()))
        for name in map(str, given)
        if name not in known_keys(section)
    ]
    return network_spec_from_yaml(kept, device_num), notes


def _check_names(config: Mapping[str, Any]) -> None:
    """Of a pair of names that means a family of ours, both must be there: half of one is no network of MindFormers'."""
    names = section_at(config, MODEL).get("type"), section_at(config, "model.arch").get("type")
    for row in FAMILIES.values():
        for pair in row.yaml_names:
            if names != pair and any(map(eq, names, pair)):
                raise UserError(
                    f"{MODEL}.type={names[0]!r} and model.arch.type={names[1]!r} do not belong together: "
                    f"write {pair[0]} and {pair[1]}, or {GENERIC_NAMES[0]} and {GENERIC_NAMES[1]}"
                )


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether MindFormers' own network is described by its words for a LLaMA."""
    return section_at(config, MODEL).get("type") == GENERIC_NAMES[0]


def has_our_weights(config: Mapping[str, Any]) -> bool:
    """Whether MindFormers' own network has the weights of our table, so that a checkpoint can be judged."""
    words = section_at(config, MODEL)
    return is_llama(config) and not any(words.get(name) for name in RESHAPING)
