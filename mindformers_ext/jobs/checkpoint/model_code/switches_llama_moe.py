# SPDX-License-Identifier: Apache-2.0
"""What of a LLaMA-MoE can be changed while it runs; a change stands in its configuration and is saved with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .configuration_llama_moe import DROPPING, LlamaMoEConfig

# word of the configuration -> what the network must have for it
ALWAYS, DROPS, RESIDUES = "", "calculator_type", "num_experts_residual"
SWITCHES = {
    "num_selects": ALWAYS,
    "gate_use_softmax": ALWAYS,
    "gate_use_balance": ALWAYS,
    "gate_balance_loss_weight": ALWAYS,
    "gate_add_noise": ALWAYS,
    "gate_noise_epsilon": ALWAYS,
    "multiply_gate_scores": ALWAYS,
    "score_scale_factor": ALWAYS,
    "drop_tokens": DROPS,
    "dropped_padding": DROPS,
    "capacity_factor": DROPS,
    "gate_use_softmax_residual": RESIDUES,
    "multiply_gate_scores_residual": RESIDUES,
    "score_scale_factor_residual": RESIDUES,
}
BY_LAYER = ("score_scale_factor", "score_scale_factor_residual")


def _switch(key: str) -> Callable[..., None]:
    def switch(self: LlamaMoESwitches, value: Any, layer_index: int | None = None) -> None:
        self.set_moe(key, value, layer_index)

    switch.__doc__ = f"Set ``{key}``{', of one layer or of all' if key in BY_LAYER else ''}."
    return switch


class LlamaMoESwitches:
    """Setters of every class of the model, under the names of the published code."""

    config: LlamaMoEConfig
    base_model: Any  # what has the layers, as transformers' models know it

    def set_moe(self, key: str, value: Any, layer_index: int | None = None) -> None:
        """Set a switch. Raises KeyError for one that the network has not, ValueError for a value not allowed."""
        config = self.config
        needed = SWITCHES.get(key)
        has = {ALWAYS: True, DROPS: config.calculator_type == DROPPING, RESIDUES: config.num_experts_residual > 0}
        if needed is None or not has[needed]:
            raise KeyError(f"this network has no {key!r}; it has {', '.join(k for k, n in SWITCHES.items() if has[n])}")
        kept = getattr(config, key)
        if layer_index is not None:
            if key not in BY_LAYER:
                raise ValueError(f"{key} is one for all layers")
            if not 0 <= layer_index < config.num_hidden_layers:
                raise ValueError(f"layer_index={layer_index}: 0 to {config.num_hidden_layers - 1}")
            factors = [config.factor(key, layer) for layer in range(config.num_hidden_layers)]
            factors[layer_index] = float(value)
            value = factors
        setattr(config, key, value)
        try:
            config.check()
        except ValueError:
            setattr(config, key, kept)
            raise

    set_moe_num_selects = _switch("num_selects")
    set_moe_gate_use_softmax = _switch("gate_use_softmax")
    set_moe_gate_use_balance = _switch("gate_use_balance")
    set_moe_gate_balance_loss_weight = _switch("gate_balance_loss_weight")
    set_moe_gate_add_noise = _switch("gate_add_noise")
    set_moe_gate_noise_epsilon = _switch("gate_noise_epsilon")
    set_moe_calculator_multiply_gate_scores = _switch("multiply_gate_scores")
    set_moe_calculator_score_scale_factor = _switch("score_scale_factor")
    set_moe_calculator_drop_tokens = _switch("drop_tokens")
    set_moe_calculator_dropped_padding = _switch("dropped_padding")
    set_moe_calculator_capacity_factor = _switch("capacity_factor")
    set_moe_residual_gate_use_softmax = _switch("gate_use_softmax_residual")
    set_moe_residual_calculator_multiply_gate_scores = _switch("multiply_gate_scores_residual")
    set_moe_residual_calculator_score_scale_factor = _switch("score_scale_factor_residual")

    def mixtures(self) -> list[Any]:
        """Each layer's routed part."""
        parts = [layer.mlp for layer in self.base_model.layers]
        return [getattr(part, "moe_layer", part) for part in parts]

    def reset_gate_network(self) -> None:
        """Fresh weights of every gate."""
        for mixture in self.mixtures():
            mixture.gate.reset()

    def reset_experts(self) -> None:
        """Fresh weights of every routed expert."""
        for mixture in self.mixtures():
            mixture.calculator.experts.reset()

    def reset_residual_experts(self) -> None:
        """Fresh weights of every residual expert. Raises KeyError without a residual block."""
        if not self.config.num_experts_residual:
            raise KeyError("this network has no residual block")
        for layer in self.base_model.layers:
            layer.mlp.residual_block.calculator.experts.reset()
