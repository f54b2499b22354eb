# SPDX-License-Identifier: Apache-2.0
"""``convert --style``: a dense LLaMA becomes a LLaMA-MoE v2, in the words of its published scripts.

With ``attention`` the heads of such a model, or of a dense one, become experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mindformers_ext.cli.command import add_switch
from mindformers_ext.core.families import MIXTRAL

if TYPE_CHECKING:
    from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest

ATTENTION = "attention"
STYLES = (MIXTRAL.name, f"{MIXTRAL.name}-residual", ATTENTION)  # two of jobs/experts/v2/parts.py
TYPES = ("modulelist",)  # as the published script calls a list of experts; how they are computed is the engine's matter


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a LLaMA-MoE v2."""
    group = parser.add_argument_group("LLaMA-MoE v2 (with --style)")
    add = group.add_argument
    text = "write a LLaMA-MoE v2: experts alone, beside what every token passes, or heads that are experts"
    add("--style", choices=STYLES, help=text)
    add("--top_k", type=int, metavar="K", help="experts that a token passes")
    add(
        "--scale_factor",
        type=float,
        metavar="S",
        help="the sum of the chosen experts is multiplied by it; default experts / top_k, of a residual model 1",
    )
    add("--num_moe_contract_layers", type=int, default=0, metavar="C", help="dense layers at each end; default 0")
    add("--gate_weights_file", type=Path, metavar="FILE", help="what gates wrote; without it gates are random")
    add("--neuron_indices_file", type=Path, metavar="FILE", help="what split wrote; without it neurons in their order")
    add("--top_k_attn", type=int, metavar="K", help="attention experts that a token passes")
    text = "the sum of the chosen attention experts is multiplied by it; default attn_experts / top_k_attn"
    add("--scale_factor_attn", type=float, metavar="S", help=text)
    add("--attn_experts", type=int, metavar="E", help="attention experts; default one for each key/value head")
    add("--moe_implementation_type", choices=TYPES, default=TYPES[0], help="one matrix per expert, the only form")
    for name, text in (
        ("--share_neurons", "the file's neurons may stand in several experts, or in none"),
        ("--truncate_gates", "gates of more experts than are written are cut to the first ones"),
        ("--pad_intermediate", "add neurons of zeros until the experts are of one size"),
        ("--fold_scale", "write what transformers computes itself: a Mixtral, of a residual model a Qwen2-MoE"),
    ):
        add_switch(group, name, text=text)


def converted(words: argparse.Namespace, output: OutputRequest) -> MergeReport:
    """Convert, or with ``--dry_run`` check."""
    if words.style == ATTENTION:
        return _attention(words, output)
    from mindformers_ext.jobs.experts.v2.mixtral import MixtralRequest, convert
    from mindformers_ext.jobs.experts.v2.parts import MixtralParts

    parts = MixtralParts(
        style=words.style,
        experts=words.num_experts,
        chosen=words.top_k,
        scale=words.scale_factor,
        ends=words.num_moe_contract_layers,
        gates=words.gate_weights_file,
        indices=words.neuron_indices_file,
        share=words.share_neurons,
        truncate=words.truncate_gates,
        pad=words.pad_intermediate,
        seed=words.seed,
    )
    request = MixtralRequest(
        model=words.model_path, parts=parts, output=output, fold=words.fold_scale, dtype=words.dtype
    )
    return convert(request, write=not words.dry_run)


def _attention(words: argparse.Namespace, output: OutputRequest) -> MergeReport:
    from mindformers_ext.jobs.experts.v2.attention import AttentionRequest, convert_attention

    request = AttentionRequest(
        model=words.model_path,
        output=output,
        chosen=words.top_k_attn,
        scale=words.scale_factor_attn,
        experts=words.attn_experts,
        ends=words.num_moe_contract_layers,
        gates=words.gate_weights_file,
        dtype=words.dtype,
        seed=words.seed,
    )
    return convert_attention(request, write=not words.dry_run)
