# SPDX-License-Identifier: Apache-2.0
"""Attention of LLaMA: rotary embedding in every way beyond the trained positions, masks, grouped queries, cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_llama_moe import LlamaMoEConfig


def rope_frequencies(config: LlamaMoEConfig, length: int) -> tuple[torch.Tensor, float]:
    """float32 (P / 2) radians per position in a text of ``length`` tokens, and what multiplies cosines and sines.

    linear: arXiv 2306.15595; dynamic and yarn: arXiv 2309.00071; llama3: arXiv 2407.21783.
    """
    words, width, trained = config.rope_parameters, config.head_dim, config.max_position_embeddings
    kind, theta, factor = words["rope_type"], words["rope_theta"], words.get("factor", 1.0)
    if kind == "dynamic":
        stretch = factor * max(length, trained) / trained - (factor - 1)
        theta = theta * stretch ** (width / (width - 2))
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return _llama3(plain, words, trained), 1.0
    if kind == "yarn":
        return _yarn(plain, words, trained, width)
    return plain, 1.0


def _llama3(plain: torch.Tensor, words: dict[str, Any], trained: int) -> torch.Tensor:
    """Slow frequencies divided, fast ones left alone, those between partly."""
    low, high = words.get("low_freq_factor", 1.0), words.get("high_freq_factor", 4.0)
    turns = words.get("original_max_position_embeddings", trained) * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / words["factor"] + share * plain


def _yarn(plain: torch.Tensor, words: dict[str, Any], trained: int, width: int) -> tuple[torch.Tensor, float]:
    """A ramp over the pairs between divided and plain, and a temperature."""
    trained = words.get("original_max_position_embeddings") or trained
    factor, theta = words["factor"], words["rope_theta"]
    fast, slow = words.get("beta_fast") or 32.0, words.get("beta_slow") or 1.0
    first, last = (width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if words.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - first) / (last - first or 0.001)
    kept = 1 - ramp.clamp(0, 1)

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = words.get("attention_factor")
    if scale is None and words.get("mscale") and words.get("mscale_all_dim"):
        scale = grown(words["mscale"]) / grown(words["mscale_all_dim"])
    return plain / factor * (1 - kept) + plain * kept, float(scale if scale is not None else grown(1.0))


def rope_tables(
    config: LlamaMoEConfig, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, 1, S, P) for positions (B, S)."""
    length = int(positions.max()) + 1 if config.rope_parameters["rope_type"] == "dynamic" and positions.numel() else 0
    plain, scale = rope_frequencies(config, length)
    angles = positions[:, None, :, None].to(torch.float32) * plain.to(positions.device)
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def turn(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, N, S, P) turned by its positions; pair i is the numbers i and i + P / 2."""
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat((-second, first), -1) * tables[1]


def attention_mask(
    given: torch.Tensor | None, batch: int, new: int, past: int, device: torch.device
) -> torch.Tensor | None:
    """(B or 1, 1, S, past + S), True where a token is seen, or None: all that came before.

    ``given``: None, (B, past + S) with 0 for padding, or (B, 1, S, ...) as it is, bool or added to the logits.
    Raises ValueError for another shape.
    """
    total = past + new
    if given is not None and given.dim() == 4:
        return given[..., :total]
    if given is not None and (given.dim() != 2 or given.shape[0] != batch or given.shape[1] < total):
        raise ValueError(f"attention_mask is {tuple(given.shape)}: ({batch}, {total}) is wanted")
    if given is None and (past == 0 or new == 1):
        return None
    place = torch.arange(total, device=device)
    seen = (place[None] <= place[past:, None])[None, None]
    if given is None:
        return seen
    own = place[None] == place[past:, None]  # a row that sees nothing has no softmax
    return seen & given[:, None, None, :total].bool() | own


class LlamaMoEAttention(nn.Module):
    """Attention with N key/value heads for H heads; with a cache, new keys and values join those of the layer."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None = None,
        past: int = 0,
        weights_wanted: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, S, H) -> (B, S, H), and the weights (B, heads, S, past + S) where they are wanted."""
        batch, new, _ = x.shape
        query, key, value = (
            project(x).view(batch, new, -1, self.config.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = turn(query, tables), turn(key, tables)
        if cache is not None:
            places = {"cache_position": torch.arange(past, past + new, device=x.device)}
            key, value = cache.update(key, value, self.layer, places)
            key, value = key[:, :, : past + new], value[:, :, : past + new]  # a static cache has room for more
        times = self.config.num_attention_heads // self.config.num_key_value_heads
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if weights_wanted or getattr(self.config, "_attn_implementation", None) == "eager":
            out, weights = spelled_out(query, key, value, mask, dropout)
        else:
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and new > 1
            )
        out = self.o_proj(out.transpose(1, 2).reshape(batch, new, -1))
        return out, weights if weights_wanted else None


def spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, heads, S, P) and weights (B, heads, S, total); softmax in float32."""
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    new, total = logits.shape[-2:]
    if mask is None and new > 1:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    weights = nn.functional.dropout(logits.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value, weights
