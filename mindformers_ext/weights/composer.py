# SPDX-License-Identifier: Apache-2.0
"""What LLM-Shearing's Composer checkpoints call a LLaMA's tensors: renames alone, nothing is turned or permuted."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.core.pruning import ROOT

# Hugging Face's name -> Composer's; {layer} stands for a layer's number.
NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.layers.{layer}.self_attn.q_proj.weight": "model.transformer.blocks.{layer}.attn.wq.weight",
    "model.layers.{layer}.self_attn.k_proj.weight": "model.transformer.blocks.{layer}.attn.wk.weight",
    "model.layers.{layer}.self_attn.v_proj.weight": "model.transformer.blocks.{layer}.attn.wv.weight",
    "model.layers.{layer}.self_attn.o_proj.weight": "model.transformer.blocks.{layer}.attn.out_proj.weight",
    "model.layers.{layer}.mlp.gate_proj.weight": "model.transformer.blocks.{layer}.mlp.gate_proj.weight",
    "model.layers.{layer}.mlp.up_proj.weight": "model.transformer.blocks.{layer}.mlp.up_proj.weight",
    "model.layers.{layer}.mlp.down_proj.weight": "model.transformer.blocks.{layer}.mlp.down_proj.weight",
    "model.layers.{layer}.input_layernorm.weight": "model.transformer.blocks.{layer}.ln_1.weight",
    "model.layers.{layer}.post_attention_layernorm.weight": "model.transformer.blocks.{layer}.ln_2.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.output.weight",
}
BACK = {composer: hf for hf, composer in NAMES.items()}
LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
START = "model.transformer."
CONSTANT = "rotary"  # in names of what is computed from rope_theta


def composer_name(name: str) -> str:
    """Composer's name of a tensor; ``UserError`` where a LLaMA has no such tensor."""
    return _renamed(name, NAMES, "LLaMA")


def hugging_face_name(name: str) -> str:
    """The other way."""
    return _renamed(name, BACK, "Composer checkpoint of LLM-Shearing")


def _renamed(name: str, names: dict[str, str], kind: str) -> str:
    number = LAYER.search(name)
    found = names.get(LAYER.sub("{layer}", name, count=1))
    if found is None:
        raise UserError(f"'{name}' is no tensor of a {kind}: only dense LLaMA models without biases have this format")
    return found.format(layer=number[1]) if number else found


def is_composer(names: Iterable[str]) -> bool:
    """Whether these are names of a Composer checkpoint."""
    return any(name.startswith(START) for name in names)


def places_of(names: Iterable[str], where: str, masked: bool = False) -> dict[str, str]:
    """Hugging Face's name -> Composer's of every weight.

    Raises:
        UserError: strangers, or the masks of a pruning run where they are not asked for (``masked``).
    """
    held = [name for name in names if CONSTANT not in name]
    masks = [name for name in held if name.startswith(ROOT)]
    if masks and not masked:
        raise UserError(
            f"'{where}' holds the masks of a pruning run ({listed(masks[:2])}): prune it first, python3 -m "
            "llmshearing.utils.post_pruning_processing prune_and_save_model"
        )
    return {hugging_face_name(name): name for name in held if not name.startswith(ROOT)}
