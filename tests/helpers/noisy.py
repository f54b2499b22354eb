# SPDX-License-Identifier: Apache-2.0
"""Cases of LLaMA-MoE's layer for both engines: sizes, weights and noise, and what the closed forms say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from tests.helpers import llama_moe_oracle as oracle

TOKENS, HIDDEN, WIDTH = 24, 10, 5  # all tokens of one routing group; an expert's width


@dataclass(frozen=True)
class Told:
    """What the closed forms say: experts (T, K), weights (T, K), the loss, its gradients by the gate's matrices in the
    order of ``NAMES``, the layer's output (T, D)."""

    index: np.ndarray
    weight: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    output: np.ndarray


@dataclass(frozen=True)
class NoisyCase:
    """One way to route. ``noise``: a training step's, or none."""

    name: str
    gate_kind: str = "mlp_noisy"
    experts: int = 6
    chosen: int = 2
    softmax: bool = True
    multiply: bool = True
    noise: bool = True
    released: bool = False
    factor: float = 3.0
    tied: bool = False  # several logits of a token are equal

    def spec(self) -> NetworkSpec:
        """A network of one such layer, dropless."""
        moe = MoESpec(
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            capacity_factor=0.0,
            gate=self.gate_kind,
            norm_topk_prob=False,
            gate_use_softmax=self.softmax,
            multiply_gate_scores=self.multiply,
            score_scale_factor=self.factor,
            gate_balance_loss_weight=0.25,
            gate_add_noise=self.noise,
            load_compat="reference" if self.released else "correct",
        )
        model = ModelSpec(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=self.experts * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            moe=moe,
            family="llama_moe",
        )
        return NetworkSpec(model=model, seq_length=TOKENS)

    def weights(self) -> dict[str, np.ndarray]:
        """By the names below ``feed_forward.``."""
        random, experts = np.random.default_rng(5), self.experts
        shapes = {"router.dense": (experts, HIDDEN), "router.noise": (experts, HIDDEN)}
        shapes |= {"router.out": (experts, experts)} if self.gate_kind == "mlp_noisy" else {}
        shapes |= {"ffn.w1": (experts, WIDTH, HIDDEN), "ffn.w3": (experts, WIDTH, HIDDEN)}
        shapes |= {"ffn.w2": (experts, HIDDEN, WIDTH)}
        found = {f"{name}.weight": random.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
        if self.tied:
            found["router.dense.weight"][:] = 0.0
        return found

    def x(self) -> np.ndarray:
        """(T, D)."""
        return np.random.default_rng(6).normal(0, 1, (TOKENS, HIDDEN)).astype(np.float32)

    def z(self) -> np.ndarray | None:
        """(T, E)."""
        drawn = np.random.default_rng(7).normal(0, 1, (TOKENS, self.experts)).astype(np.float32)
        return drawn if self.noise else None

    def gate(self) -> tuple[oracle.Gate, oracle.GateForm]:
        """The oracle's form."""
        weights = self.weights()
        layers = tuple(weights[name] for name in self.layers())
        return (
            oracle.Gate(layers, weights["router.noise.weight"]),
            oracle.GateForm(self.chosen, self.softmax, weight=0.25, released=self.released),
        )

    def layers(self) -> list[str]:
        """Names of the gate's matrices."""
        return ["router.dense.weight", *(["router.out.weight"] if self.gate_kind == "mlp_noisy" else [])]

    def output(self, keep_TK: np.ndarray | None = None) -> np.ndarray:
        """(T, D), where ``keep_TK`` is given of the assignments that it keeps."""
        weights, x = self.weights(), self.x()
        parts = (weights[f"ffn.{name}.weight"] for name in ("w1", "w3", "w2"))
        routing = oracle.route(x, *self.gate(), self.z())
        experts = list(zip(*parts, strict=True))
        return oracle.routed_output(x, routing, experts, multiply=self.multiply, factor=self.factor, keep_TK=keep_TK)

    def told(self) -> Told:
        """The closed forms."""
        x, z, (gate, form) = self.x(), self.z(), self.gate()
        routing = oracle.route(x, gate, form, z)
        layers, noise, _ = oracle.balance_gradients(x, gate, form, z)
        return Told(
            routing.index,
            routing.scores * self.factor if self.multiply else np.ones_like(routing.scores),
            routing.balance,
            {**dict(zip(self.layers(), layers, strict=True)), "router.noise.weight": noise},
            self.output(),
        )


CASES = [
    NoisyCase("two layers, noise"),
    NoisyCase("two layers, noise, as released", released=True),
    NoisyCase("linear, raw logits as scores, noise", gate_kind="linear_noisy", softmax=False),
    NoisyCase("plain sum, no noise", multiply=False, noise=False),
    NoisyCase("raw logits, no noise, as released", softmax=False, noise=False, released=True),
    NoisyCase("all chosen", chosen=6, factor=6.0),
    NoisyCase("one expert", experts=1, chosen=1),
    NoisyCase("equal logits", gate_kind="linear_noisy", noise=False, tied=True),
]
