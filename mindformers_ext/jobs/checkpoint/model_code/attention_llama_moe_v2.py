# SPDX-License-Identifier: Apache-2.0
"""Attention of LLaMA-MoE v2 whose heads are experts: each has one key/value head and some query heads.

A token has keys and values in the experts alone that it passes. All are computed and cached for all tokens; whether a
token passes an expert stands behind its values in the cache, as one more number, so that any cache of transformers
keeps and reorders it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, one_hot
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .configuration_llama_moe_v2 import LlamaMoEV2Config


class LlamaMoEV2Attention(nn.Module):
    """``real`` (B, S) bool tells it which tokens are counted in ``balance`` (2, E)."""

    real: torch.Tensor | None = None
    balance: torch.Tensor | None = None

    def __init__(self, config: LlamaMoEV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, width, experts = config.hidden_size, config.head_dim, int(config.attn_experts or 0)
        queries = config.num_attention_heads // experts * width
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.q_proj = nn.ModuleList(nn.Linear(hidden, queries, bias=False) for _ in range(experts))
        self.k_proj = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(experts))
        self.v_proj = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(experts))
        bias = config.add_rescale_bias
        self.o_proj = nn.ModuleList(nn.Linear(queries, hidden, bias=bias) for _ in range(experts))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x (B, S, H): what each expert's output is multiplied by, 0 where a token does not pass it, and 1 where it
        does, both (B, S, E)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        chance = linear(x.to(wide), self.gate.weight.to(wide)).softmax(-1)
        weight, index = chance.topk(self.config.top_k_attn, -1)
        weight = weight / weight.sum(-1, keepdim=True) * self.config.scale_factor_attn
        seen = one_hot(index, chance.shape[-1]).sum(-2).to(chance.dtype)
        if self.training:
            self.balance = shares(chance.flatten(0, 1), seen.flatten(0, 1), self.real)
        return torch.zeros_like(chance).scatter(-1, index, weight).to(x.dtype), seen.to(x.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache_position: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, S, H) -> (B, S, H), and the weights (B, heads, S, all tokens)."""
        x, width, experts = hidden_states, self.config.head_dim, len(self.q_proj)
        batch, new, _ = x.shape
        weight, seen = self.route(x)
        query = torch.cat([project(x) for project in self.q_proj], -1).view(batch, new, -1, width).transpose(1, 2)
        key = torch.stack([project(x) for project in self.k_proj], 1)
        value = torch.stack([project(x) for project in self.v_proj], 1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value = torch.cat((value, seen.transpose(1, 2)[..., None]), -1)
        store = cache if cache is not None else past_key_values
        if store is not None:
            key, value = store.update(key, value, self.layer_idx, {"cache_position": cache_position})
        value, passed = value[..., :width], value[..., width] > 0.5  # (B, E, all tokens)
        total = key.shape[2]
        times = query.shape[1] // experts
        allowed = visible(attention_mask, new, total, x.device) & passed[:, :, None]
        logits = (query.view(batch, experts, times, new, width) @ key[:, :, None].transpose(3, 4)) * width**-0.5
        logits = logits.float().masked_fill(~allowed[:, :, None], torch.finfo(torch.float32).min / 2)
        weights = logits.softmax(-1).to(x.dtype)
        mixed = weights @ value[:, :, None]
        out = sum(
            weight[..., place, None] * project(mixed[:, place].permute(0, 2, 1, 3).reshape(batch, new, -1))
            for place, project in enumerate(self.o_proj)
        )
        return out, weights.flatten(1, 2)


def shares(chance: torch.Tensor, passed: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(2, E) of tokens (T, E): the share that ``passed`` each expert, and its mean ``chance``; of ``real`` ones."""
    if real is not None and real.numel() == len(chance):
        chance, passed = chance[real.reshape(-1)], passed[real.reshape(-1)]
    return torch.stack((passed.to(chance.dtype).mean(0), chance.mean(0)))


def visible(mask: torch.Tensor | None, new: int, total: int, device: torch.device) -> torch.Tensor:
    """(B or 1, 1, S, total) bool: which tokens each sees, from what transformers hands to a layer."""
    if mask is None:
        return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]
    mask = mask[..., :total]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
