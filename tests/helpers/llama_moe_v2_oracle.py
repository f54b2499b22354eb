# SPDX-License-Identifier: Apache-2.0
"""A whole LLaMA-MoE v2 in float64, from its file's words and tensors: loops where they are the definition.

Imports nothing of what it judges. Source: arXiv 2411.15708. Every function takes the words of config.json and tensors
by the names of the files, so that autograd gives every gradient; a dense LLaMA is one with all layers dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, silu

Words = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Balances = dict[str, list[Tensor]]


def logits(words: Words, tensors: Tensors, ids: Tensor, balances: Balances | None = None) -> Tensor:
    """(B, S, V) of ids (B, S), float64; ``balances`` gets what each gate's loss of balance is."""
    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(words["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        own = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
        mixes = expert_attention if "self_attn.gate.weight" in own else attention
        before = norm(words, x, own["input_layernorm.weight"])
        told(balances, "heads", own.get("self_attn.gate.weight"), before.flatten(0, 1), words.get("top_k_attn") or 0)
        x = x + mixes(words, own, before)
        flat = norm(words, x, own["post_attention_layernorm.weight"]).flatten(0, 1)
        told(balances, "mlp", own.get("block_sparse_moe.gate.weight"), flat, words.get("num_experts_per_tok") or 0)
        x = x + feed_forward(words, own, flat).view_as(x)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return linear(norm(words, x, tensors["model.norm.weight"]), head)


def loss(words: Words, tensors: Tensors, ids: Tensor) -> Tensor:
    """Mean cross entropy of ids (B, S+1), and the losses of balance, of each kind of gate the mean over layers."""
    balances: Balances = {}
    found = cross_entropy(logits(words, tensors, ids[:, :-1], balances).flatten(0, 1), ids[:, 1:].flatten())
    return found + words["router_aux_loss_coef"] * sum(balance(words, kind, told) for kind, told in balances.items())


def balance(words: Words, kind: str, layers: list[Tensor]) -> Tensor:
    """Of one kind of gate, from the (2, E) shares of each layer (spec, section 6)."""
    shape = words.get("aux_loss_type", "layerwise")
    if shape == "legacy_constant":
        chosen = words["top_k_attn"] if kind == "heads" else words["num_experts_per_tok"]
        return torch.tensor(layers[0].shape[1] / chosen, dtype=layers[0].dtype)
    if shape == "switch":
        layers = [sum(layers[1:], layers[0]) / len(layers)]
    return sum(part.shape[1] * (part[0] * part[1]).sum() for part in layers) / len(layers)


def told(balances: Balances | None, kind: str, gate: Tensor | None, x: Tensor, chosen: int) -> None:
    """The share of tokens (T, H) that choose each expert, and its mean probability (2, E)."""
    if balances is None or gate is None:
        return
    chance = linear(x, gate).softmax(-1)
    taken = torch.zeros_like(chance).scatter(1, chance.topk(chosen, -1).indices, 1.0)
    balances.setdefault(kind, []).append(torch.stack((taken.mean(0), chance.mean(0))))


def norm(words: Words, x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) times a weight."""
    return x / (x.square().mean(-1, keepdim=True) + words["rms_norm_eps"]).sqrt() * weight


def attention(words: Words, own: Tensors, x: Tensor) -> Tensor:
    """One head after the other, rotate-half positions from 0."""
    heads, groups = words["num_attention_heads"], words["num_key_value_heads"]
    width, length = words["hidden_size"] // heads, x.shape[1]
    q, k, v = (linear(x, own[f"self_attn.{name}_proj.weight"], _bias(own, name)) for name in "qkv")
    above = torch.ones(length, length).triu(1).bool()
    out = []
    for head in range(heads):
        mine, group = slice(head * width, (head + 1) * width), head // (heads // groups)
        theirs = slice(group * width, (group + 1) * width)
        scores = turn(words, q[..., mine]) @ turn(words, k[..., theirs]).transpose(1, 2) / width**0.5
        out.append(scores.masked_fill(above, -torch.inf).softmax(-1) @ v[..., theirs])
    return linear(torch.cat(out, -1), own["self_attn.o_proj.weight"], _bias(own, "o"))


def expert_attention(words: Words, own: Tensors, x: Tensor) -> Tensor:
    """Row after row, expert after expert: the tokens that pass it attend to each other alone, at their own places."""
    experts, chosen = own["self_attn.gate.weight"].shape[0], words["top_k_attn"]
    width = words["hidden_size"] // words["num_attention_heads"]
    rows = []
    for row in x:
        chance = linear(row, own["self_attn.gate.weight"]).softmax(-1)
        best = chance.topk(chosen, -1)
        weight = torch.zeros_like(chance).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        out = torch.zeros_like(row)
        for expert in range(experts):
            places = (best.indices == expert).any(1).nonzero()[:, 0]
            q, k, v = (linear(row, own[f"self_attn.{name}_proj.{expert}.weight"]) for name in "qkv")
            k, v = turn(words, k[None])[0][places], v[places]
            late = places[None] > places[:, None]
            heads = []
            for head in q.split(width, -1):
                scores = turn(words, head[None])[0][places] @ k.T / width**0.5
                heads.append(scores.masked_fill(late, -torch.inf).softmax(-1) @ v)
            bias = own.get(f"self_attn.o_proj.{expert}.bias")
            mixed = linear(torch.cat(heads, -1), own[f"self_attn.o_proj.{expert}.weight"], bias)
            out = out.index_add(0, places, mixed * weight[places, expert, None])
        rows.append(out * words["scale_factor_attn"])
    return torch.stack(rows)


def _bias(own: Tensors, name: str) -> Tensor | None:
    return own.get(f"self_attn.{name}_proj.bias")


def turn(words: Words, x: Tensor) -> Tensor:
    """(B, S, P) turned by its places."""
    length, width = x.shape[1:]
    speed = words["rope_theta"] ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def swiglu(own: Tensors, x: Tensor, gate: str, up: str, down: str) -> Tensor:
    """One feed-forward part of (T, H)."""
    return linear(silu(linear(x, own[gate])) * linear(x, own[up]), own[down])


def feed_forward(words: Words, own: Tensors, x: Tensor) -> Tensor:
    """Dense by either spelling, or y = residual(x) + s * sum of w_e expert_e(x), token by token."""
    if "mlp.gate_proj.weight" in own:
        return swiglu(own, x, *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
    if "block_sparse_moe.w1.weight" in own:
        return swiglu(own, x, *(f"block_sparse_moe.{name}.weight" for name in ("w1", "w3", "w2")))
    out = torch.zeros_like(x)
    for token, chance in enumerate(linear(x, own["block_sparse_moe.gate.weight"]).softmax(-1)):
        best = chance.topk(words["num_experts_per_tok"])
        for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            names = (f"block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2"))
            bias = own.get(f"block_sparse_moe.experts.{expert}.w2.bias", 0.0)
            out[token] = out[token] + words["scale_factor"] * weight * (swiglu(own, x[token], *names) + bias)
    if words.get("intermediate_size_residual"):
        out = out + swiglu(own, x, *(f"mlp_residual.{name}.weight" for name in ("w1", "w3", "w2")))
    return out
