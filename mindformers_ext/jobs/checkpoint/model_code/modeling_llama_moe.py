# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE (arXiv 2406.16554) for transformers 4.57 and 5: a decoder of LLaMA's shape with experts in every layer.

Weights have the names of the published checkpoints; one that is missing or left over is an error. In training the gate
adds noise (from torch's generator) and the loss of balance, summed over the layers, is added to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_llama_moe import LlamaMoEAttention, attention_mask, rope_tables
from .configuration_llama_moe import LlamaMoEConfig
from .mixture_llama_moe import LlamaMoEMixture, LlamaMoEReport, LlamaMoEResidualMixture, init_weights
from .switches_llama_moe import LlamaMoESwitches

HEADS = ("lm_head.weight", "score.weight")  # what one class has and another has not


# what the installed version calls the cache in outputs
CACHE = "cache" if "cache" in {item.name for item in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass
class LlamaMoEOutput(BaseModelOutputWithPast):
    """Of the decoder. Load and importance (layers, E), dropped assignments and the loss of balance: where counted."""

    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: int | None = None
    gate_load: torch.Tensor | None = None
    gate_importance: torch.Tensor | None = None


@dataclass
class LlamaMoEHeadOutput(CausalLMOutputWithPast):
    """Of a model with a head: the same, counted in training or with labels; ``loss`` has the loss of balance in it."""

    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: int | None = None
    gate_load: torch.Tensor | None = None
    gate_importance: torch.Tensor | None = None


def headed(output: LlamaMoEOutput, loss: torch.Tensor | None, logits: torch.Tensor) -> LlamaMoEHeadOutput:
    """What a head makes of the decoder's output."""
    kept = {item.name: getattr(output, item.name) for item in fields(output) if item.name != "last_hidden_state"}
    return LlamaMoEHeadOutput(loss=loss, logits=logits, **kept)


class LlamaMoERMSNorm(nn.Module):
    """x / rms(x) times a weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shape of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LlamaMoEDecoderLayer(nn.Module):
    """Attention, then experts, each behind a norm and beside the stream."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LlamaMoEAttention(config, layer)
        self.mlp = (LlamaMoEResidualMixture if config.num_experts_residual else LlamaMoEMixture)(config, layer)
        self.input_layernorm = LlamaMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaMoERMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        real: torch.Tensor | None,
        cache: Cache | None,
        past: int,
        weights_wanted: bool,
        counted: bool,
    ) -> tuple:
        """x (B, S, H) -> the stream behind the layer, attention's weights, and the items of the mixture's report:
        flat, because a recomputed layer passes gradients through its outputs alone, not through what is in them."""
        out, weights = self.self_attn(self.input_layernorm(x), tables, mask, cache, past, weights_wanted)
        x = x + out
        out, report = self.mlp(self.post_attention_layernorm(x), real, counted)
        return x + out, weights, *report


class LlamaMoEPreTrainedModel(LlamaMoESwitches, PreTrainedModel):
    """First weights, and a loading that knows every name."""

    config_class = LlamaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a trainer divides the whole loss, the part of balance as well
    _supports_sdpa = True
    _no_split_modules = ["LlamaMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)
        if isinstance(module, LlamaMoERMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, but ValueError for a weight that is missing or that nobody asked for."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = {key for key in info["missing_keys"] if not model.may_miss(key)}
        left = {key for key in info["unexpected_keys"] if not key.endswith(HEADS)}
        if missing or left:
            raise ValueError(
                "the files do not hold this model's weights: "
                f"{_some(missing, 'missing')}; {_some(left, 'not of this model')}"
            )
        return (model, info) if wanted else model

    def may_miss(self, key: str) -> bool:
        """A new head of a classifier; a noise that is not used, all 0."""
        return key == "score.weight" or (key.endswith(".weight_noise.weight") and not self.config.gate_add_noise)


def _some(keys: set[str], what: str) -> str:
    first = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} {what}" + (f" ({first}{', ...' if len(keys) > 3 else ''})" if keys else "")


class LlamaMoEModel(LlamaMoEPreTrainedModel):
    """Embedding, layers, last norm."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of tokens."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        counted: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LlamaMoEOutput | tuple:
        """ids (B, S) or embeddings (B, S, H). ``counted``: load, importance and their loss; None: in training."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        cache = past_key_values if past_key_values is not None else kwargs.pop("cache", None)
        _refuse(kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        saving = self.gradient_checkpointing and self.training
        if cache is None and not saving and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        run = _Run(
            tables=rope_tables(self.config, position_ids, x.dtype),
            mask=_mask(attention_mask, x, past),
            real=_real(attention_mask, x, past),
            cache=cache,
            past=past,
            weights_wanted=_choice(output_attentions, self.config.output_attentions),
            counted=self.training if counted is None else counted,
        )
        states, weights, reports = [x], [], []
        for layer in self.layers:
            call = (self._gradient_checkpointing_func, layer.__call__) if saving else (layer,)
            x, weight, *report = call[0](*call[1:], x, *run.values())
            states.append(x)
            weights.append(weight)
            reports.append(LlamaMoEReport(*report))
        states[-1] = x = self.norm(x)
        output = LlamaMoEOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if _choice(output_hidden_states, self.config.output_hidden_states) else None,
            attentions=tuple(weights) if run.weights_wanted else None,
            **{CACHE: cache, **(_summed(reports) if run.counted else {})},
        )
        return output if _choice(return_dict, self.config.return_dict) else output.to_tuple()


@dataclass
class _Run:
    """What all layers are given beside the stream, in their order."""

    tables: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    real: torch.Tensor | None
    cache: Cache | None
    past: int
    weights_wanted: bool
    counted: bool

    def values(self) -> tuple:
        return (self.tables, self.mask, self.real, self.cache, self.past, self.weights_wanted, self.counted)


def _refuse(kwargs: dict[str, Any]) -> None:
    """transformers 4 tells where the cache is filled, which is known here; anything else is a mistake."""
    wrong = [name for name, value in kwargs.items() if value is not None and name != "cache_position"]
    if wrong:
        raise TypeError(f"unknown argument {', '.join(wrong)}")


def _choice(given: bool | None, default: bool | None) -> bool:
    return bool(default if given is None else given)


def _mask(given: torch.Tensor | None, x: torch.Tensor, past: int) -> torch.Tensor | None:
    mask = attention_mask(given, x.shape[0], x.shape[1], past, x.device)
    return mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask


def _real(given: torch.Tensor | None, x: torch.Tensor, past: int) -> torch.Tensor | None:
    """(B, S), False for padding, where a mask of tokens is given."""
    return given[:, past : past + x.shape[1]].bool() if given is not None and given.dim() == 2 else None


def _summed(reports: list[LlamaMoEReport]) -> dict[str, Any]:
    return {
        "balance_loss": torch.stack([report.balance_loss for report in reports]).sum(),
        "gate_load": torch.stack([report.load for report in reports]),
        "gate_importance": torch.stack([report.importance for report in reports]),
        "num_dropped_tokens": sum(report.dropped for report in reports),
    }


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, GenerationMixin):
    """Decoder and a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.model = LlamaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of tokens."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Another head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LlamaMoEHeadOutput | tuple:
        """Logits (B, S, V) of the last ``logits_to_keep`` tokens (0: all); with labels (B, S) the mean loss of the next
        token, -100 left out, plus the loss of balance."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            counted=self.training or labels is not None,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(output.last_hidden_state[:, keep]), None
        if labels is not None:
            wide = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(wide, labels[:, 1:].reshape(-1).to(wide.device)) + output.balance_loss
        output = headed(output, loss, logits)
        return output if _choice(return_dict, self.config.return_dict) else output.to_tuple()


class LlamaMoEForSequenceClassification(LlamaMoEPreTrainedModel):
    """Decoder and a head over labels at each text's last token."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaMoEModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of tokens."""
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LlamaMoEHeadOutput | tuple:
        """Logits (B, labels) at the last token that is not padding, by the mask or else by ``pad_token_id``; with
        labels (B,) the loss of ``problem_type``, plus the loss of balance."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            counted=self.training or labels is not None,
            return_dict=True,
            **kwargs,
        )
        states = output.last_hidden_state
        last = self.last_token(input_ids, attention_mask, states)
        logits, loss = self.score(states[torch.arange(len(states), device=states.device), last]), None
        if labels is not None:
            loss = self.head_loss(logits, labels.to(logits.device)) + output.balance_loss
        output = headed(output, loss, logits)
        return output if _choice(return_dict, self.config.return_dict) else output.to_tuple()

    def last_token(
        self, input_ids: torch.Tensor | None, mask: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        """(B,) places."""
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        if mask is None:
            return torch.full((len(states),), states.shape[1] - 1, device=states.device)
        return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)

    def head_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy, or what ``problem_type`` says; one label is a regression, floats for many are several."""
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and self.num_labels == 1):
            return nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        if kind == "multi_label_classification" or (kind is None and labels.is_floating_point()):
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)
