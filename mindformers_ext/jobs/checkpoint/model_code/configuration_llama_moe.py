# SPDX-License-Identifier: Apache-2.0
"""Configuration of LLaMA-MoE (arXiv 2406.16554): LLaMA's words and those of its experts, checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

GATE_TYPES = ("TopKBalancedNoisyGate",)
THRESHOLD = "threshold"
GATE_NETWORKS = ("mlp", "linear", THRESHOLD)
DROPPING = "SwitchDropTokenCalculator"
CALCULATORS = ("UniversalCalculator", DROPPING)
PADDINGS = ("zero", "input")
LOADS = ("correct", "reference")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")

# What the words of config.json mean; a value of theirs is an attribute of the same name.
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,  # all neurons of a layer
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # None: as many as heads
    "head_dim": None,  # None: hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 16,
    "num_selects": 4,
    "size_experts": None,  # None: equal; else a list for each layer, each summing to the neurons of a layer
    "gate_type": GATE_TYPES[0],
    "gate_network": "mlp",  # two layers with tanh between; linear: one, first all 0; threshold: see BY_THRESHOLD
    "gate_use_softmax": True,  # over the chosen logits; else the logits are the scores
    "gate_use_balance": True,
    "gate_balance_loss_weight": 1e-2,
    "gate_add_noise": True,  # in training
    "gate_noise_epsilon": 1e-2,
    "load_compat": "correct",  # reference: counts load as the released code does
    "calculator_type": CALCULATORS[0],
    "multiply_gate_scores": True,  # else a plain sum of the chosen experts
    "score_scale_factor": 1.0,  # or a list, one a layer
    "add_weight_norm": False,  # one learned scalar in place of the factor
    "drop_tokens": True,  # these three: with SwitchDropTokenCalculator, in training
    "dropped_padding": "zero",
    "capacity_factor": 1.25,
}
# What the words above must be where a token passes the experts whose score W x + b is 0 or more, none or all of them:
# no noise and no loss, experts are added up as they are, and num_selects is num_experts.
BY_THRESHOLD: dict[str, Any] = {
    "gate_use_softmax": False,
    "gate_use_balance": False,
    "gate_add_noise": False,
    "load_compat": LOADS[0],
    "calculator_type": CALCULATORS[0],
    "multiply_gate_scores": False,
    "score_scale_factor": 1.0,
    "add_weight_norm": False,
}
RESIDUAL: dict[str, Any] = {
    "num_experts_residual": 0,  # 0: no residual block
    "intermediate_size_moe": None,
    "intermediate_size_residual": None,
    "size_experts_residual": None,
    "gate_use_softmax_residual": True,
    "multiply_gate_scores_residual": True,
    "score_scale_factor_residual": 1.0,
    "use_weighting": False,
}


class LlamaMoEConfig(PretrainedConfig):
    """LLaMA's configuration with experts; ``num_experts_residual`` > 0 adds a block that every token passes.

    Raises ValueError for a value that no network can be made of.
    """

    model_type = "llama_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        words = {name: kwargs.pop(name, default) for name, default in {**LLAMA, **MIXTURE, **RESIDUAL}.items()}
        heads = words["num_attention_heads"]
        words["num_key_value_heads"] = words["num_key_value_heads"] or heads
        words["head_dim"] = words["head_dim"] or words["hidden_size"] // heads
        for name, value in words.items():
            setattr(self, name, value)
        self.rope_parameters = _rope(rope_theta, rope_scaling, rope_parameters)
        self.rope_theta = self.rope_parameters["rope_theta"]
        self.check()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def check(self) -> None:
        """Raise ValueError with what is wrong and what is allowed."""
        for name, allowed in (
            ("gate_type", GATE_TYPES),
            ("gate_network", GATE_NETWORKS),
            ("calculator_type", CALCULATORS),
            ("dropped_padding", PADDINGS),
            ("load_compat", LOADS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if not 1 <= self.num_selects <= self.num_experts:
            raise ValueError(f"num_selects={self.num_selects}: 1 to num_experts={self.num_experts}")
        if self.gate_network == THRESHOLD:
            for name, value in {**BY_THRESHOLD, "num_selects": self.num_experts}.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name}={getattr(self, name)!r} with gate_network={THRESHOLD!r}: only {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor}: it must be positive")
        if self.num_experts_residual and self.routed_size() + self.residual_size() != self.intermediate_size:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} is not intermediate_size_moe={self.routed_size()} "
                f"+ intermediate_size_residual={self.residual_size()}"
            )
        for layer in range(self.num_hidden_layers):
            self.factor("score_scale_factor", layer)
            self.factor("score_scale_factor_residual", layer)
            self.sizes(layer)
            self.residual_sizes(layer)

    def routed_size(self) -> int:
        """Neurons of a layer's routed experts."""
        if not self.num_experts_residual:
            return int(self.intermediate_size)
        if self.intermediate_size_moe is not None:
            return int(self.intermediate_size_moe)
        return int(self.intermediate_size - (self.intermediate_size_residual or 0))

    def residual_size(self) -> int:
        """Neurons of a layer's residual experts."""
        if not self.num_experts_residual:
            return 0
        if self.intermediate_size_residual is not None:
            return int(self.intermediate_size_residual)
        return int(self.intermediate_size - self.routed_size())

    def sizes(self, layer: int) -> list[int]:
        """Neurons of each routed expert of a layer."""
        return _sizes("size_experts", self.size_experts, layer, self.num_experts, self.routed_size())

    def residual_sizes(self, layer: int) -> list[int]:
        """Neurons of each residual expert of a layer."""
        count, total = self.num_experts_residual, self.residual_size()
        return _sizes("size_experts_residual", self.size_experts_residual, layer, count, total) if count else []

    def factor(self, name: str, layer: int) -> float:
        """A number for all layers, or a list with one for each."""
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return float(value)
        if len(value) != self.num_hidden_layers:
            raise ValueError(f"{name} has {len(value)} values for {self.num_hidden_layers} layers")
        return float(value[layer])


def _sizes(name: str, value: Any, layer: int, count: int, total: int) -> list[int]:
    if value is None:
        if total < count or total % count:
            raise ValueError(f"{total} neurons cannot be shared by {count} experts: give {name}, a list for each layer")
        return [total // count] * count
    if layer >= len(value):
        raise ValueError(f"{name} has {len(value)} lists, layer {layer} has none")
    sizes = [int(size) for size in value[layer]]
    if len(sizes) != count or sum(sizes) != total or min(sizes) < 1:
        raise ValueError(
            f"{name} of layer {layer} is {sizes}: {count} sizes of 1 or more that sum to {total} are wanted"
        )
    return sizes


def _rope(theta: float | None, scaling: dict[str, Any] | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """One form of both spellings: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` with both."""
    words = dict(parameters or scaling or {})
    inner = words.get("rope_theta")
    if theta is not None and inner is not None and float(theta) != float(inner):
        raise ValueError(f"rope_theta={theta} and rope_parameters.rope_theta={inner} differ")
    words["rope_theta"] = float(inner if inner is not None else 10000.0 if theta is None else theta)
    words["rope_type"] = words.pop("type", None) or words.get("rope_type") or "default"
    if words["rope_type"] not in ROPES:
        raise ValueError(f"rope_type={words['rope_type']!r}: allowed are {', '.join(ROPES)}")
    return words
