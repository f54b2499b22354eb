# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE v2 (arXiv 2411.15708) for transformers 4.57 and 5: LLaMA with experts in its feed-forward parts.

y = residual(x) + scale_factor * sum of w_e expert_e(x) over the chosen experts, w their probabilities brought to a sum
of 1; heads may be experts, too. Weights have the names of the published checkpoints; one that is missing or left over
is an error. In training ``router_aux_loss_coef`` times the loss of balance, the mean of all layers', is added to the
loss.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, one_hot, silu
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .attention_llama_moe_v2 import LlamaMoEV2Attention, shares
from .configuration_llama_moe_v2 import LlamaMoEV2Config


class LlamaMoEV2SwiGlu(nn.Module):
    """w2(silu(w1 x) * w3 x): an expert, the residual part, or a dense layer's feed-forward."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shape of x."""
        out: torch.Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return out


class LlamaMoEV2Mixture(nn.Module):
    """A gate and its experts; ``real`` (B, S) bool tells it which tokens are counted in ``balance`` (2, E)."""

    real: torch.Tensor | None = None
    balance: torch.Tensor | None = None

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__()
        self.chosen, self.scale = config.num_experts_per_tok, config.scale_factor
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            LlamaMoEV2SwiGlu(config.hidden_size, config.intermediate_size, config.add_rescale_bias)
            for _ in range(config.num_local_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, S, H) -> the weighed sum of each token's experts."""
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        chance = linear(flat.to(wide), self.gate.weight.to(wide)).softmax(-1)
        weight, index = chance.topk(self.chosen, -1)
        weight = (weight / weight.sum(-1, keepdim=True) * self.scale).to(x.dtype)
        if self.training:
            self.balance = shares(chance, one_hot(index, chance.shape[-1]).sum(1), self.real)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            out = out.index_add(0, token, expert(flat[token]) * weight[token, place, None])
        return out.view_as(x)


def balance_loss(kind: str, parts: Sequence[Any], chosen: int) -> torch.Tensor:
    """E * sum of (share of tokens that chose an expert) * (its mean probability), chosen where all are used alike: the
    mean over layers, or with "switch" of all layers' tokens together; "legacy_constant" is E / chosen."""
    found = torch.stack([part.balance for part in parts])
    experts = found.shape[-1]
    if kind == "legacy_constant":
        return found.new_tensor(experts / chosen)
    if kind == "switch":
        found = found.mean(0, keepdim=True)
    return experts * (found[:, 0] * found[:, 1]).sum(-1).mean()


class LlamaMoEV2DecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with another feed-forward part, which it calls as ``mlp``."""

    def __init__(self, config: LlamaMoEV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.mlp
        self.mlp_residual = None
        if config.is_dense(layer_idx):
            self.block_sparse_moe: nn.Module = LlamaMoEV2SwiGlu(config.hidden_size, config.dense_size())
            return
        if config.use_attn_moe:
            self.self_attn = LlamaMoEV2Attention(config, layer_idx)
        self.block_sparse_moe = LlamaMoEV2Mixture(config)
        if config.intermediate_size_residual:
            self.mlp_residual = LlamaMoEV2SwiGlu(config.hidden_size, config.intermediate_size_residual)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer adds behind attention."""
        out: torch.Tensor = self.block_sparse_moe(x)
        return out if self.mlp_residual is None else out + self.mlp_residual(x)


class LlamaMoEV2Strict:
    """A loading that knows every name, and what all classes of the model say."""

    config_class = LlamaMoEV2Config
    accepts_loss_kwargs = False  # a trainer divides the whole loss, the part of balance as well
    _no_split_modules = ["LlamaMoEV2DecoderLayer"]
    _keep_in_fp32_modules_strict = ["gate"]
    _supports_flash_attn = False  # its masks are none that attention experts can use
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, but ValueError for a weight that is missing or that nobody asked for."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        left = {key for key in info["unexpected_keys"] if not key.endswith("lm_head.weight")}
        found = {"missing": sorted(info["missing_keys"]), "not of this model": sorted(left)}
        if any(found.values()):
            said = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:5])})" for what, keys in found.items() if keys)
            raise ValueError(f"the files do not hold this model's weights: {said}")
        return (model, info) if wanted else model

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute layers; always the form that passes gradients through the loss of balance."""
        words = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        super().gradient_checkpointing_enable(words)  # type: ignore[misc]


class LlamaMoEV2Model(LlamaMoEV2Strict, LlamaModel):
    """Embedding, layers, last norm."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        config.check()
        super(LlamaModel, self).__init__(config)  # LLaMA's own layers are not wanted
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaMoEV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LlamaMoEV2ForCausalLM(LlamaMoEV2Strict, LlamaForCausalLM):
    """Decoder and a head over the vocabulary."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaMoEV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(LlamaForCausalLM.forward)  # generate looks for names in the signature
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As LLaMA's; in training the loss has that of balance in it."""
        attentions = [part for part in self.modules() if isinstance(part, LlamaMoEV2Attention)]
        mixtures = [part for part in self.modules() if isinstance(part, LlamaMoEV2Mixture)]
        real = attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
        parts: list[Any] = [*mixtures, *attentions]
        for part in parts:
            part.real = real
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        coefficient = self.config.router_aux_loss_coef or 0.0
        if not self.training or not coefficient or kwargs.get("labels") is None:
            return output
        balance = balance_loss(self.config.aux_loss_type, mixtures, self.config.num_experts_per_tok)
        if attentions:
            balance = balance + balance_loss(self.config.aux_loss_type, attentions, self.config.top_k_attn)
        loss = output[0] + coefficient * balance
        if isinstance(output, tuple):
            return loss, *output[1:]
        output.loss = loss
        return output
