# SPDX-License-Identifier: Apache-2.0
"""What LLaMA-MoE's gate and experts are called; everything else is LLaMA's.

One matrix per expert, and their names do not end in ``.weight`` (LLaMA-MoE-v1). A gate of two layers numbers them as
``nn.Sequential`` does, with tanh between.
"""

from __future__ import annotations

from mindformers_ext.weights.rules import Rule
from mindformers_ext.weights.transforms import Stack

_HF, _MS = "model.layers.{layer}.mlp.", "model.layers.{layer}.feed_forward."
_NETWORK, _EXPERTS = _HF + "gate.gate_network.", _HF + "calculator.experts."

NOISE_AND_EXPERTS = (
    Rule(_HF + "gate.weight_noise.weight", (_MS + "router.noise.weight",), "E D"),
    Rule(_EXPERTS + "weight_gate.{expert}", (_MS + "ffn.w1.weight",), "M D", Stack()),
    Rule(_EXPERTS + "weight_down.{expert}", (_MS + "ffn.w2.weight",), "D M", Stack()),
    Rule(_EXPERTS + "weight_up.{expert}", (_MS + "ffn.w3.weight",), "M D", Stack()),
)
# By the kind of gate (``core.families.GATES``).
GATES = {
    "mlp_noisy": (
        Rule(_NETWORK + "0.weight", (_MS + "router.dense.weight",), "E D"),
        Rule(_NETWORK + "2.weight", (_MS + "router.out.weight",), "E E"),
    ),
    "linear_noisy": (Rule(_NETWORK + "weight", (_MS + "router.dense.weight",), "E D"),),
}
STYLES = {"per_expert": NOISE_AND_EXPERTS}
