# SPDX-License-Identifier: Apache-2.0
"""What models compute with and no shape shows: heads, activation, rotary settings, windows, scales.

Weights of models that differ there mean different things. Where the difference makes a mean meaningless (the same
matrix read as 4 or as 8 heads) it is an error, elsewhere a note that names whose value is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import Problems
from mindformers_ext.jobs.merge.fit import full_config
from mindformers_ext.jobs.merge.models import Model

ACTIVATION = "hidden_act"
DECIDING = ("num_attention_heads", "num_key_value_heads", "head_dim", ACTIVATION)
NOTED = (
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "max_window_layers",
    "num_experts_per_tok",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
SAME = {"swish": "silu"}


def check_constants(
    models: Mapping[str, Model], names: list[str], donor: Model, allow_crimes: bool, problems: Problems
) -> list[str]:
    """Compare models ``names`` with ``donor``, whose config.json is written; returns notes.

    Heads and activation that differ are problems, or with ``allow_crimes`` notes too.
    """
    found = {name: constants_of(models[name]) for name in dict.fromkeys([donor.name, *names])}
    notes = []
    for key in (*DECIDING, *NOTED):
        values = {name: values.get(key) for name, values in found.items()}
        mine = values[donor.name]
        if all(value == mine for value in values.values()):
            continue
        listed = ", ".join(f"'{name}' {value}" for name, value in values.items())
        if key in DECIDING and not allow_crimes:
            problems.add(
                f"{key} differs: {listed}",
                "equal shapes do not make equal meaning: take models of one architecture, or pass --allow-crimes",
            )
        else:
            notes.append(f"{key} differs ({listed}): the merge has {mine}, that of '{donor.name}'")
    return notes


def constants_of(model: Model) -> dict[str, Any]:
    """What a model computes with, by key of config.json, spelled one way."""
    full = full_config(model.architecture, with_both_ropes({**model.architecture.defaults, **model.config}))
    act = full.get(ACTIVATION) or full.get("hidden_activation")
    result = {key: full.get(key) for key in (*DECIDING, *NOTED)} | {ACTIVATION: SAME.get(str(act), act)}
    if full.get("use_sliding_window") is False:  # the switch of Qwen's families
        result |= {"sliding_window": None, "max_window_layers": None}
    if result["rope_scaling"]:
        kind = result["rope_scaling"].get("rope_type", result["rope_scaling"].get("type"))
        rest = {key: value for key, value in result["rope_scaling"].items() if key not in ("type", "rope_type")}
        result["rope_scaling"] = {"rope_type": kind, **dict(sorted(rest.items()))}
    return result
