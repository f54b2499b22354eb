# SPDX-License-Identifier: Apache-2.0
"""How a LLaMA-MoE chooses and weighs experts, in the words of its config.json, and the gate's own tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mindformers_ext.core.config.hf_attention import with_both_ropes
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import LLAMA_MOE, THRESHOLD
from mindformers_ext.core.philox import normal, seeds
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import BIAS, NOISE, ONLY, WEIGHTS

PRESETS = ("moefication", LLAMA_MOE.name)
NETWORKS = tuple(WEIGHTS)  # two matrices with tanh between, or one
WRITTEN = {**WEIGHTS, THRESHOLD: (ONLY, BIAS)}  # tensors of all that a file can hold


@dataclass(frozen=True, kw_only=True)
class Gating:
    """What config.json says of the gate. ``factors``: one for all layers, or one for each.

    ``softmax``: scores are probabilities among the chosen; ``multiply``: scores and factor weigh the experts' outputs,
    otherwise these are added up as they are.
    """

    chosen: int
    network: str = "mlp"
    softmax: bool = True
    multiply: bool = True
    factors: float | tuple[float, ...] = 1.0
    noise: bool = True
    balance: float = 1e-2

    def factor_of(self, layer: int) -> float:
        """The factor of one layer."""
        return self.factors[layer] if isinstance(self.factors, tuple) else self.factors

    def collect(self, experts: int, layers: int, problems: Problems) -> None:
        """Add what cannot be."""
        if self.network not in WRITTEN:
            problems.add(f"gate_type={self.network}", f"use one of {', '.join(NETWORKS)}")
        if not 1 <= self.chosen <= experts:
            problems.add(f"num_selects={self.chosen} of {experts} experts", f"choose 1 to {experts}")
        if not self.multiply and self.factors != 1.0:
            problems.add(
                f"score_scale_factor {self.factors} without multiply_gate_scores has no effect",
                "pass --multiply_gate_scores True, or leave the factor out",
            )
        if isinstance(self.factors, tuple) and len(self.factors) != layers:
            problems.add(
                f"{len(self.factors)} score scale factors for {layers} layers",
                "give one for each layer, or one for all",
            )


def preset(name: str, experts: int, chosen: int) -> dict[str, Any]:
    """Fields of ``Gating``: ``moefication`` adds the chosen experts up as the dense model would, ``llama_moe`` weighs
    them by their probabilities times experts / chosen, to be trained on (llama-moe's README, "Convert")."""
    if name == PRESETS[0]:
        return {"softmax": False, "multiply": False, "factors": 1.0, "noise": False}
    return {"softmax": True, "multiply": True, "factors": experts / chosen, "noise": True}


def mixture_config(
    dense: Mapping[str, Any], splits: Mapping[int, LayerSplit], gating: Gating, dtype: str
) -> dict[str, Any]:
    """config.json of the mixture: the dense model's, and what its experts and gate are.

    Raises:
        UserError: layers with different numbers of experts, which no config.json can say.
    """
    kinds = {(len(split.experts), len(split.residual)) for split in splits.values()}
    if len(kinds) > 1:
        raise UserError(f"layers have different numbers of experts ({sorted(kinds)}): split all layers alike")
    first = splits[0]
    width = sum(first.sizes) + sum(first.residual_sizes)
    result = {
        key: value for key, value in with_both_ropes(dense).items() if key not in ("_name_or_path", "auto_map", "dtype")
    }
    result |= {
        "architectures": [LLAMA_MOE.hf_class],
        "model_type": LLAMA_MOE.name,
        "torch_dtype": dtype,
        "intermediate_size": width,
        "num_experts": len(first.experts),
        "num_selects": gating.chosen,
        "size_experts": [list(splits[layer].sizes) for layer in sorted(splits)],
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": gating.network,
        "gate_use_softmax": gating.softmax,
        "gate_use_balance": gating.balance > 0,
        "gate_balance_loss_weight": gating.balance,
        "gate_add_noise": gating.noise,
        "gate_noise_epsilon": 1e-2,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": gating.multiply,
        "score_scale_factor": list(gating.factors) if isinstance(gating.factors, tuple) else gating.factors,
        "add_weight_norm": False,
    }
    if first.residual:
        result |= {
            "num_experts_residual": len(first.residual),
            "size_experts_residual": [list(splits[layer].residual_sizes) for layer in sorted(splits)],
            "intermediate_size_moe": sum(first.sizes),
            "intermediate_size_residual": sum(first.residual_sizes),
            "use_weighting": False,
            # the residual gate is 0, so that its softmax gives each of R experts 1 / R: R times that is their plain sum
            "gate_use_softmax_residual": True,
            "multiply_gate_scores_residual": True,
            "score_scale_factor_residual": float(len(first.residual)),
        }
    return result


def random_gates(layers: int, experts: int, width: int, network: str, std: float, seed: int) -> list[dict[str, Any]]:
    """Gates nobody has fitted: normal weights of ``std``, different in every layer; by names below ``gate.``."""
    shapes = {"mlp": ((experts, width), (experts, experts)), "linear": ((experts, width),)}[network]
    draws = iter(islice(seeds(seed), layers * len(shapes)))
    return [
        {
            name: normal(next(draws), shape[0] * shape[1], std).reshape(shape)
            for name, shape in zip(WEIGHTS[network], shapes, strict=True)
        }
        for _ in range(layers)
    ]


def check_gate(layer: int, gate: Mapping[str, np.ndarray], network: str, experts: int, width: int) -> None:
    """A gate must have the tensors of its kind.

    Raises:
        UserError: it has not; says which kind it is where that can be told.
    """
    second = (experts,) if network == THRESHOLD else (experts, experts)
    wanted = dict(zip(WRITTEN[network], ((experts, width), second), strict=False))
    found = {name: array.shape for name, array in gate.items() if name != NOISE}
    if found == wanted:
        return
    kind = next((name for name in NETWORKS if set(found) == set(WEIGHTS[name])), None)
    advice = f"pass --gate_type {kind}" if kind and kind != network else "fit the gates of this model and split again"
    raise UserError(f"the gate of layer {layer} holds {found}, a gate of type {network} has {wanted}: {advice}")


def read_factors(value: object, layers: int) -> float | tuple[float, ...]:
    """One score scale factor, or one per layer, from numbers of a JSON file or a command line."""
    numbers: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise UserError(f"score scale factors {str(value)[:80]!r}: expected a number, or a list of {layers} numbers")
    factors = tuple(float(x) for x in numbers if isinstance(x, int | float))
    if not all(np.isfinite(factors)):
        raise UserError(f"score scale factors {factors}: they must be finite")
    return factors if isinstance(value, list | tuple) else factors[0]
