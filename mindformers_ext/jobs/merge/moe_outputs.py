# SPDX-License-Identifier: Apache-2.0
"""The models that an assembly can write, as a table: names of their tensors, what may go in, their config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core import families
from mindformers_ext.core.config.hf_attention import with_both_ropes

GATE, DOWN, UP = "gate_proj", "down_proj", "up_proj"
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Output:
    """One kind of mixture. ``moe`` stands between the layer's name and its parts, ``matrices``: those of an expert.

    ``words``: what ``architecture`` may be the beginning of. ``fits``: the kinds of model that can go in, which with
    ``one_kind`` must all be the same. ``biased``: q, k and v have biases. ``shared``: how many shared experts it has.
    ``count_key`` and ``width_key`` are config.json's for the experts and their width.
    """

    kind: str
    name: str
    words: tuple[str, ...]
    moe: str
    matrices: Mapping[str, str]
    fits: tuple[str, ...]
    config: Mapping[str, Any]
    count_key: str = "num_experts"
    width_key: str = "moe_intermediate_size"
    one_kind: bool = False
    biased: bool = False
    shared: int = 0


LLAMA_LIKE = (families.LLAMA.name, families.MISTRAL.name)
MIXTRAL = Output(
    families.MIXTRAL.name,
    families.MIXTRAL.hf_class,
    (families.MIXTRAL.name,),
    "block_sparse_moe.",
    {GATE: "w1", DOWN: "w2", UP: "w3"},
    LLAMA_LIKE,
    {"router_jitter_noise": 0.0},
    count_key="num_local_experts",
    width_key="intermediate_size",
)
DENSE, NORMALISED = "mlp_only_layers", "norm_topk_prob"
_QWEN = {NORMALISED: True, "decoder_sparse_step": 1, DENSE: [], "use_sliding_window": False}
_SAME_NAMES = {GATE: GATE, DOWN: DOWN, UP: UP}
QWEN2_MOE = Output(
    families.QWEN2_MOE.name,
    families.QWEN2_MOE.hf_class,
    ("qwen moe", "qwen2 moe", families.QWEN2_MOE.name),
    "mlp.",
    _SAME_NAMES,
    (*LLAMA_LIKE, families.QWEN2.name),
    _QWEN | {"qkv_bias": True},
    one_kind=True,
    biased=True,
    shared=1,
)
QWEN3_MOE = Output(
    families.QWEN3_MOE.name,
    families.QWEN3_MOE.hf_class,
    ("qwen3 moe", families.QWEN3_MOE.name),
    "mlp.",
    _SAME_NAMES,
    (families.QWEN3.name,),
    _QWEN | {"attention_bias": False},
)
OUTPUTS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
WHY_NOT = {
    "phi3": "its attention and feed-forward are stored and sized differently, so its experts fit no other model",
    families.QWEN2.name: "its attention has biases, and a Mixtral has none; with one shared_experts entry a Qwen2-MoE "
    "is written",
    families.QWEN3.name: "its heads have norms, which only a Qwen3-MoE has, and that has no shared expert",
    "gemma2": "its layers have four norms, and no mixture here has them",
    "granite": "its layers scale what they add, and no mixture here does",
    families.MIXTRAL.name: "it is a mixture already",
}


def fitting_output(kind: str, shared: int, otherwise: Output) -> Output:
    """What is written from models of ``kind`` with ``shared`` shared experts; ``otherwise`` where nothing fits."""
    return next((item for item in OUTPUTS if kind in item.fits and item.shared == shared), otherwise)


def mixture_config(
    output: Output,
    base: Mapping[str, Any],
    experts: int,
    chosen: int,
    *,
    segments: int,
    dtype: str,
    tied: bool,
    dense: Collection[int] = (),
    normalised: bool = True,
) -> dict[str, Any]:
    """config.json of the mixture. Everything that the output's defaults would change is written out.

    ``segments``: into how many of the ``experts`` each feed-forward was split. ``dense`` and ``normalised``: see
    ``MoEConfig``; for outputs that can have them.
    """
    kind = str(base.get("model_type"))
    full = with_both_ropes({**families.defaults_of(kind), **base})
    result: dict[str, Any] = {"architectures": [output.name], "model_type": output.kind}
    result |= {key: full.get(key) for key in COPIED}
    heads = result["num_attention_heads"]
    result["num_key_value_heads"] = result["num_key_value_heads"] or heads
    result["head_dim"] = result["head_dim"] or result["hidden_size"] // heads
    result |= {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "num_experts_per_tok": chosen,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    width = result["intermediate_size"]
    result |= {output.count_key: experts, output.width_key: width // segments}
    if output.shared:
        result["shared_expert_intermediate_size"] = width
    if "use_sliding_window" in output.config:
        result["max_window_layers"] = result["num_hidden_layers"]
    result |= output.config
    return result | {
        key: value for key, value in ((DENSE, sorted(dense)), (NORMALISED, normalised)) if key in output.config
    }
