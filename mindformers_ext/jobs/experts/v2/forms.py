# SPDX-License-Identifier: Apache-2.0
"""What a LLaMA-MoE v2 is called in a file: tensors and config.json, in its own form and in two that transformers has.

Folded, a mixture is a plain Mixtral: the factor of the experts' sum is in each expert's last matrix. With a residual
part it is a Qwen2-MoE whose shared expert has a gate of 0: its sigmoid is one half, so that twice the part is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.families import LLAMA_MOE_V2, MIXTRAL, QWEN2_MOE
from mindformers_ext.core.layers import LAYERWISE

MATRICES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}  # of a dense layer, and the axis of its neurons
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
HALF_GATE = 2.0  # one over the sigmoid of 0


@dataclass(frozen=True)
class Form:
    """Templates below ``model.layers.N.``; ``matrix``: what each of ``MATRICES`` is called in them. ``always_gate``: of
    the part that every token passes, "" where it has none. ``always_factor``: by which its last matrix is multiplied.
    """

    name: str
    gate: str
    expert: str
    always: str
    dense: str
    matrix: Mapping[str, str]
    always_gate: str = ""
    always_factor: float = 1.0


V2 = Form(
    LLAMA_MOE_V2.name,
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{}.{}.weight",
    "mlp_residual.{}.weight",
    "block_sparse_moe.{}.weight",
    _W,
)
PLAIN = Form(MIXTRAL.name, V2.gate, V2.expert, "", "", _W)
SHARED = Form(
    QWEN2_MOE.name,
    "mlp.gate.weight",
    "mlp.experts.{}.{}.weight",
    "mlp.shared_expert.{}.weight",
    "mlp.{}.weight",
    {name: name for name in _W},
    "mlp.shared_expert_gate.weight",
    HALF_GATE,
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a mixture: ``size`` neurons an expert, ``always`` of the residual part, ``whole`` of a dense layer; ``ends``:
    dense layers at each end of ``layers``; ``scale``: of the experts' sum."""

    layers: int
    ends: int
    experts: int
    chosen: int
    size: int
    always: int
    whole: int
    scale: float

    @property
    def mixtures(self) -> range:
        """The layers with experts."""
        return range(self.ends, self.layers - self.ends)


def config_of(form: Form, dense: Mapping[str, Any], sizes: Sizes, dtype: str) -> dict[str, Any]:
    """config.json of the mixture in ``form``, from the dense model's. ``sizes.scale``: what is left of the factor."""
    left_out = ("_name_or_path", "auto_map", "dtype", "architectures", "model_type")
    result = {key: value for key, value in with_both_ropes(dense).items() if key not in left_out}
    result |= {"torch_dtype": dtype, "num_experts_per_tok": sizes.chosen}
    result |= {"router_aux_loss_coef": 0.01, "output_router_logits": False, "sliding_window": None}
    if form is SHARED:
        result.pop("head_dim", None)  # transformers 4 multiplies by what stands there
        dense_layers = [layer for layer in range(sizes.layers) if layer not in sizes.mixtures]
        return result | {
            "architectures": [QWEN2_MOE.hf_class],
            "model_type": QWEN2_MOE.name,
            "intermediate_size": sizes.whole,
            "num_experts": sizes.experts,
            "moe_intermediate_size": sizes.size,
            "shared_expert_intermediate_size": sizes.always,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers,
            "use_sliding_window": False,
        }
    result |= {"architectures": [MIXTRAL.hf_class], "model_type": MIXTRAL.name}
    result |= {"num_local_experts": sizes.experts, "intermediate_size": sizes.size}
    if form is PLAIN:
        return result
    return result | {
        "intermediate_size_dense": sizes.whole,
        "intermediate_size_residual": sizes.always or None,
        "scale_factor": sizes.scale,
        "num_moe_contract_layers": sizes.ends,
        "moe_type": "modulelist",
        "use_attn_moe": False,
        "attn_experts": None,
        "top_k_attn": None,
        "scale_factor_attn": None,
        "aux_loss_type": LAYERWISE,
        "use_layer_wise_balance": False,
        "add_rescale_bias": False,
    }
