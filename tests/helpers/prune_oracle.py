# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA in float64 numpy, masked or pruned, layer by layer with sizes of its own: the oracle of pruning.

Weights by Hugging Face's names; masks as plain arrays. Written from the formulas alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """What shapes do not tell."""

    head_dim: int
    theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False


def random_weights(rng: np.random.Generator, layers: int, d: int, heads: int, kv: int, dh: int, inner: int, vocab: int,
                   tied: bool = False) -> dict[str, np.ndarray]:  # fmt: skip
    """Weights whose logits are of size 1 or so."""

    def draw(*shape: int, std: float = 0.3) -> np.ndarray:
        return rng.normal(0.0, std, shape).astype(np.float32)

    found = {"model.embed_tokens.weight": draw(vocab, d, std=1.0)}
    for n in range(layers):
        at = f"model.layers.{n}."
        found |= {
            at + "input_layernorm.weight": 1.0 + draw(d),
            at + "self_attn.q_proj.weight": draw(heads * dh, d),
            at + "self_attn.k_proj.weight": draw(kv * dh, d),
            at + "self_attn.v_proj.weight": draw(kv * dh, d),
            at + "self_attn.o_proj.weight": draw(d, heads * dh),
            at + "post_attention_layernorm.weight": 1.0 + draw(d),
            at + "mlp.gate_proj.weight": draw(inner, d),
            at + "mlp.up_proj.weight": draw(inner, d),
            at + "mlp.down_proj.weight": draw(d, inner),
        }
    found["model.norm.weight"] = 1.0 + draw(d)
    if not tied:
        found["lm_head.weight"] = draw(vocab, d)
    return found


def logits(weights: Weights, ids: np.ndarray, sizes: Sizes, masks: Mapping[str, Any] | None = None) -> np.ndarray:
    """(S, V) of token ids (S). ``masks``: hidden (d); by layer heads (H), intermediate (I), attention, mlp."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    masks = masks or {}
    z = masks.get("hidden", np.ones(w["model.norm.weight"].shape[0]))
    table = w["model.embed_tokens.weight"]
    x = table[ids] * ((z != 0) if sizes.tied else z)
    cos, sin = _rotation(len(ids), sizes)
    for n in range(1 + max(int(name.split(".")[2]) for name in w if ".layers." in name)):
        at = f"model.layers.{n}."
        own = {part: masks[part][n] for part in ("heads", "intermediate", "attention", "mlp") if part in masks}
        m = _norm(x, w[at + "input_layernorm.weight"], z, sizes.eps)
        mixed = _attend(m, w, at + "self_attn.", own.get("heads"), sizes, cos, sin)
        x = x + mixed * own.get("attention", 1.0) * z
        m = _norm(x, w[at + "post_attention_layernorm.weight"], z, sizes.eps)
        gate = m @ w[at + "mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (m @ w[at + "mlp.up_proj.weight"].T * own.get("intermediate", 1.0))
        x = x + inner @ w[at + "mlp.down_proj.weight"].T * own.get("mlp", 1.0) * z
    head = table if sizes.tied else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], z, sizes.eps) @ head.T


def _norm(x: np.ndarray, weight: np.ndarray, z: np.ndarray, eps: float) -> np.ndarray:
    kept = z != 0
    return x * weight / np.sqrt((x**2 * kept).sum(-1, keepdims=True) / max(kept.sum(), 1) + eps) * z


def _rotation(length: int, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    half = sizes.head_dim // 2
    angle = np.outer(np.arange(length), sizes.theta ** (-np.arange(half) / half))
    return tuple(np.concatenate((f(angle), f(angle)), -1) for f in (np.cos, np.sin))  # type: ignore[return-value]


def _attend(
    m: np.ndarray, w: Weights, at: str, mask: Any, sizes: Sizes, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    dh, length = sizes.head_dim, len(m)
    q, k, v = ((m @ w[f"{at}{name}_proj.weight"].T).reshape(length, -1, dh) for name in "qkv")
    group = q.shape[1] // max(k.shape[1], 1) if k.shape[1] else 1
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    mixed = np.zeros_like(q)
    for head in range(q.shape[1]):
        a, b = _turned(q[:, head], cos, sin), _turned(k[:, head // group], cos, sin)
        s = a @ b.T / np.sqrt(dh) + hidden
        p = np.exp(s - s.max(-1, keepdims=True))
        mixed[:, head] = p / p.sum(-1, keepdims=True) @ v[:, head // group] * (1.0 if mask is None else mask[head])
    return mixed.reshape(length, -1) @ w[at + "o_proj.weight"].T


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    low, high = np.split(x, 2, -1)
    return x * cos + np.concatenate((-high, low), -1) * sin
