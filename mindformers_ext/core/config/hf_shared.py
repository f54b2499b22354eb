# SPDX-License-Identifier: Apache-2.0
"""What a ``config.json`` says of shared experts and dense layers, and by which words it means a variant of a family.

LLaMA-MoE with and without residual experts are two families here and one class, with one ``model_type``, there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.values import read_value
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.families import FAMILIES, Family, end_layers
from mindformers_ext.core.layers import SharedExpertSpec, told_sizes

# how a layer's width is shared by routed and shared experts: either may be said, the other one is the rest
ROUTED_WIDTH, SHARED_WIDTH = "intermediate_size_moe", "intermediate_size_residual"


def told_variant(config: Mapping[str, Any], row: Family) -> Family:
    """The variant of ``row``, or of what ``row`` is one of, that the file tells by its keys, else ``row``."""

    def tells(other: Family) -> bool:
        told = any(config.get(key) not in (None, 0) for key in other.variant_key.split())
        return other.variant_of == (row.variant_of or row.name) and told

    return next(filter(tells, FAMILIES.values()), row)


def as_variant(config: Mapping[str, Any], row: Family) -> Mapping[str, Any]:
    """``config`` with the defaults of the class that it is written for, where ``row`` is a variant in its words."""
    if not row.variant_of or config.get("model_type") == row.name:
        return config
    return {**{word.key: word.default for word in FAMILIES[row.variant_of].words}, **config}


def splits_width(row: Family) -> bool:
    """Whether routed and shared experts share a layer's width."""
    return row.shares_width and row.shared is not None


def read_shared(
    config: Mapping[str, Any],
    row: Family,
    words: Mapping[str, Any],
    model: Mapping[str, Any],
    problems: Problems,
) -> SharedExpertSpec:
    """The shared experts of ``row`` from its ``words`` that are read already and the ``model``'s fields. Where all
    experts share a layer's width, the shared ones' or the routed ones' may be said, or both."""
    found = {**(row.shared or {}), **words}
    if splits_width(row):
        whole, own = model["intermediate_size"], found["intermediate_size"]
        routed = read_value(ROUTED_WIDTH, config.get(ROUTED_WIDTH), "int", None, problems)
        if own is None and routed is None:
            problems.add(f"no {SHARED_WIDTH} and no {ROUTED_WIDTH}", f"give one: together they are {whole}")
        elif None not in (own, routed) and own + routed != whole:
            problems.add(
                f"intermediate_size={whole} is not {ROUTED_WIDTH}={routed} + {SHARED_WIDTH}={own}", "correct one"
            )
        width = own if own is not None else whole - (routed or 0)
        sizes = told_sizes(found["expert_sizes"], found["num_experts"], width, model)
        found |= {"intermediate_size": width, "expert_sizes": sizes}
    return SharedExpertSpec(**found)


ATTENTION_KEYS = ("use_attn_moe", "attn_experts", "top_k_attn", "scale_factor_attn")


def read_attention_experts(config: Mapping[str, Any], groups: Any, problems: Problems) -> dict[str, Any]:
    """The fields of ``ModelSpec`` about attention experts; where the file does not say how many, one for each of
    ``groups`` key/value heads."""
    switch, *words = ATTENTION_KEYS
    if not read_value(switch, config.get(switch), "bool", False, problems):
        return {}
    found = {
        words[0]: read_value(words[0], config.get(words[0]), "int", groups, problems),
        words[1]: read_value(words[1], config.get(words[1]), "int", None, problems),
        words[2]: read_value(words[2], config.get(words[2]), "float", None, problems),
    }
    missing = [name for name in words[1:] if found[name] is None]
    if missing:
        problems.add(f"{', '.join(missing)} of attention experts", "give how many a token passes, and their factor")
    return found


def written_attention_experts(spec: Any) -> dict[str, Any]:
    """The keys of a ``ModelSpec``."""
    switch, *words = ATTENTION_KEYS
    on = spec.attn_experts > 0
    return {switch: on, **{name: getattr(spec, name) if on else None for name in words}}


def read_width(
    config: Mapping[str, Any], row: Family, parts: Mapping[str, Mapping[str, Any]], problems: Problems
) -> int:
    """The width of dense layers where ``intermediate_size`` is an expert's: as said, or that of all experts together,
    which were one."""
    shared = parts["shared"].get("intermediate_size") or 0
    together = parts["moe"]["num_local_experts"] * parts["moe"]["intermediate_size"] + shared
    found: int = read_value(row.dense_width, config.get(row.dense_width), "int", together, problems)
    return found


def read_ends(config: Mapping[str, Any], row: Family, layers: int, problems: Problems) -> tuple[int, ...]:
    """The layers that are dense because they stand at an end."""
    count = read_value(row.dense_ends, config.get(row.dense_ends), "int", 0, problems)
    if count < 0 or 2 * count >= layers > 0:
        problems.add(
            f"{row.dense_ends}={count} of {layers} layers", "no layer would be a mixture: give fewer, 0 or more"
        )
        return ()
    return end_layers(count, layers)
