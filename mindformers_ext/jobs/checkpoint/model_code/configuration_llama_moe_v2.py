# SPDX-License-Identifier: Apache-2.0
"""Configuration of LLaMA-MoE v2 (arXiv 2411.15708): LLaMA's words and those of its experts, checked by the network."""

from __future__ import annotations

import math
from typing import Any

from transformers import LlamaConfig

WORDS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "scale_factor": None,  # of the sum of the chosen experts; it must be told
    "intermediate_size_residual": None,  # neurons of the part that every token passes
    "intermediate_size_dense": None,  # of dense layers; intermediate_size is an expert's
    "num_moe_contract_layers": 0,  # dense layers at each end
    "moe_type": "modulelist",
    "router_aux_loss_coef": 0.0,
    "aux_loss_type": "layerwise",  # the loss of balance: of each layer, of all together (switch), or legacy_constant
    "sliding_window": None,
    "use_attn_moe": False,  # key/value heads, each with its query heads, are experts outside dense layers
    "attn_experts": None,  # None: one for each key/value head
    "top_k_attn": None,
    "scale_factor_attn": None,
    "add_rescale_bias": False,  # experts, also of heads, have a bias of their own behind their last matrix
}
BALANCES = ("layerwise", "switch", "legacy_constant")
BUILT = {"moe_type": "modulelist", "mlp_bias": False}


class LlamaMoEV2Config(LlamaConfig):
    """LLaMA's configuration with experts."""

    model_type = "llama_moe_v2"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**WORDS, **kwargs})
        self.attn_experts: int | None
        if self.use_attn_moe and self.attn_experts is None:
            self.attn_experts = self.num_key_value_heads

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers has it; the published files call the model a Mixtral, which is no reason to warn."""
        words, rest = super().get_config_dict(*args, **kwargs)
        return ({**words, "model_type": cls.model_type} if words.get("model_type") == "mixtral" else words), rest

    def check(self) -> None:
        """Raise ValueError with what is wrong and what is allowed."""
        for name, wanted in BUILT.items():
            if getattr(self, name, wanted) != wanted:
                raise ValueError(f"{name}={getattr(self, name)!r}: this code computes {wanted!r}")
        if self.scale_factor is None or not 0 < self.scale_factor < math.inf:
            raise ValueError(f"scale_factor={self.scale_factor}: give the factor of the experts' sum, above 0")
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: 1 to {self.num_local_experts}")
        if self.aux_loss_type not in BALANCES:
            raise ValueError(f"aux_loss_type={self.aux_loss_type!r}: {', '.join(BALANCES)} are known")
        if self.use_attn_moe:
            self.check_attention()
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ValueError(f"sliding_window={self.sliding_window}: this code sees every token, set it to null")

    def check_attention(self) -> None:
        """Raise ValueError for attention experts that cannot be."""
        count, groups, heads = self.attn_experts or 0, self.num_key_value_heads, self.num_attention_heads
        if count < 1 or count % groups or heads % count:
            raise ValueError(f"attn_experts={count}: a multiple of {groups} that divides {heads} is wanted")
        if self.top_k_attn is None or not 1 <= self.top_k_attn <= count:
            raise ValueError(f"top_k_attn={self.top_k_attn}: 1 to {count}")
        if self.scale_factor_attn is None or not 0 < self.scale_factor_attn < math.inf:
            raise ValueError(f"scale_factor_attn={self.scale_factor_attn}: give a factor above 0")
        if self.attention_bias:
            raise ValueError("attention_bias=True: attention experts have none")

    def is_dense(self, layer: int) -> bool:
        """Whether a layer stands at an end."""
        return not self.num_moe_contract_layers <= layer < self.num_hidden_layers - self.num_moe_contract_layers

    def dense_size(self) -> int:
        """Neurons of a dense layer: as told, or those of all experts together."""
        together = self.num_local_experts * self.intermediate_size + (self.intermediate_size_residual or 0)
        return int(self.intermediate_size_dense or together)
