# SPDX-License-Identifier: Apache-2.0
"""What LLaMA-MoE's gate and experts are called; everything else is LLaMA's.

One matrix per expert, and their names do not end in ``.weight`` (LLaMA-MoE-v1). A gate of two layers numbers them as
``nn.Sequential`` does, with tanh between. With residual experts the routed ones and their gate stand below
``moe_layer.``; here the residual ones are one shared expert as wide as all of them.
"""

from __future__ import annotations

from mindformers_ext.core.parameters import ROUTED
from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import Concatenated, Stack

_HF, _MS = "model.layers.{layer}.mlp.", "model.layers.{layer}.feed_forward."
_ALWAYS = _HF + "residual_block."
_EXPERTS = _ALWAYS + "calculator.experts."


def routed(prefix: str = _HF, start: str = _MS) -> tuple[Rule, ...]:
    """Routed experts; ``start``: what stands before them on MindSpore's side."""
    experts = prefix + "calculator.experts."
    return (
        Rule(experts + "weight_gate.{expert}", (start + "ffn.w1.weight",), "M D", Stack()),
        Rule(experts + "weight_down.{expert}", (start + "ffn.w2.weight",), "D M", Stack()),
        Rule(experts + "weight_up.{expert}", (start + "ffn.w3.weight",), "M D", Stack()),
    )


def gates(prefix: str = _HF, start: str = _MS) -> dict[str, tuple[Rule, ...]]:
    """By the kind of gate (``core.families.GATES``)."""
    network = prefix + "gate.gate_network."
    noise = Rule(prefix + "gate.weight_noise.weight", (start + "router.noise.weight",), "E D")
    only = Rule(network + "weight", (start + "router.dense.weight",), "E D")
    return {
        "mlp_noisy": (
            noise,
            Rule(network + "0.weight", (start + "router.dense.weight",), "E D"),
            Rule(network + "2.weight", (start + "router.out.weight",), "E E"),
        ),
        "linear_noisy": (noise, only),
        "threshold": (only, Rule(network + "bias", (start + "router.dense.bias",), "E")),
    }


STYLES, GATES = {"per_expert": routed()}, gates()
_INNER = (_HF + "moe_layer.", _MS + ROUTED)
RESIDUAL = (
    Rule(_EXPERTS + "weight_gate.{shared}", (_MS + "shared_experts.w1.weight",), "S D", Concatenated(0)),
    Rule(_EXPERTS + "weight_down.{shared}", (_MS + "shared_experts.w2.weight",), "D S", Concatenated(1)),
    Rule(_EXPERTS + "weight_up.{shared}", (_MS + "shared_experts.w3.weight",), "S D", Concatenated(0)),
    Rule(_ALWAYS + "gate.gate_network.weight", (_MS + "shared_experts_gate.weight",), "R D"),
)
RESIDUAL_STYLES, RESIDUAL_GATES = {"per_expert": (*routed(*_INNER), *RESIDUAL)}, gates(*_INNER)
WEIGHTING = (Rule(_HF + "weighting_network.0.weight", (_MS + "weighting.weight",), "2 D"),)
