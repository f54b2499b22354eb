# SPDX-License-Identifier: Apache-2.0
"""Routed experts beside shared ones that every token passes (DeepSeekMoE, arXiv:2401.06066, section 3.2)."""

from __future__ import annotations

import mindspore.ops.operations as P
from mindspore import Tensor, nn, ops

from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.feed_forward import FeedForwardOutput, SwiGlu
from mindformers_ext.ms.moe.gate import RouterGate
from mindformers_ext.ms.moe.layer import MoE
from mindformers_ext.ms.moe.residual import MeanRows, WeighedExperts
from mindformers_ext.ms.moe.rows import scaled_rows
from mindformers_ext.ms.ops.portable import outer_product
from mindformers_ext.ms.ops.select import Operators
from mindformers_ext.ms.strategies import Shards


class GatedRows(nn.Cell):
    """rows * sigmoid(logit) * scale. Inputs: rows (T, D), logit (T, 1) float32. Output (T, D)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.sigmoid, self.outer = P.Sigmoid(), outer_product()

    def construct(self, y_TD: Tensor, logit_T: Tensor) -> Tensor:
        return scaled_rows(y_TD, ops.cast(self.sigmoid(logit_T) * self.scale, y_TD.dtype), self.outer)


class ScaledRows(nn.Cell):
    """rows * scale. Input and output (T, D)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def construct(self, y_TD: Tensor) -> Tensor:
        return y_TD * self.scale if self.scale != 1.0 else y_TD


class SharedMoE(nn.Cell):
    """routed(x) + scale * sigmoid(gate x) * shared(x), without the sigmoid where the shared expert has no gate (with
    it: Qwen2-MoE); of several that are weighed each: routed(x) + sum of scale * score * shared expert(x) (LLaMA-MoE).
    A ``FeedForward``; loss and report are those of the routed experts."""

    def __init__(self, spec: NetworkSpec, moe: MoESpec, operators: Operators) -> None:
        super().__init__()
        shared, shards = moe.shared_expert or SharedExpertSpec(intermediate_size=0), Shards(spec)
        self.routed_experts = MoE(spec, moe, operators)
        self.shared_experts = SwiGlu(spec, shared.intermediate_size, operators)
        self.gated, self.weighs_each, self.is_mean = shared.gated, shared.weighs_each, shared.use_weighting
        std, width = spec.model.initializer_range, spec.model.hidden_size
        router_dtype = operators.router_dtype(moe.router_dtype)
        if self.gated:
            self.shared_experts_gate = RouterGate(width, 1, std, router_dtype)
            self.shared_experts_gate.product = shards.shard(self.shared_experts_gate.product, "gate")
            self.weigh = shards.local(operators.build(GatedRows, shared.scale_of(0)), "gated rows")
        elif self.weighs_each:
            self.shared_experts_gate = RouterGate(width, shared.num_experts, 0.0, router_dtype)
            self.shared_experts_gate.product = shards.shard(self.shared_experts_gate.product, "gate")
            self.weigh_each = WeighedExperts(shared, shards, operators)
        else:
            self.scale = shards.local(operators.build(ScaledRows, shared.scale_of(0)), "scaled rows")
        if self.is_mean:
            self.weighting = RouterGate(width, 2, std, router_dtype)
            self.weighting.product = shards.shard(self.weighting.product, "gate")
            self.mean = shards.local(operators.build(MeanRows), "mean rows")
        self.add = shards.shard(P.Add(), "residual")

    def always(self, x_TD: Tensor) -> Tensor:
        """The shared experts' part (T, D)."""
        if self.weighs_each:
            hidden_TF = self.shared_experts.hidden(x_TD)
            return self.shared_experts.w2(self.weigh_each(hidden_TF, self.shared_experts_gate(x_TD)))
        y_TD = self.shared_experts.product(x_TD)
        if self.gated:
            return self.weigh(y_TD, self.shared_experts_gate(x_TD))
        return self.scale(y_TD)

    def together(self, routed_TD: Tensor, x_TD: Tensor) -> Tensor:
        """The routed experts' output beside the shared ones' of the same rows (T, D)."""
        if self.is_mean:
            return self.mean(routed_TD, self.always(x_TD), self.weighting(x_TD))
        return self.add(routed_TD, self.always(x_TD))

    def construct(
        self, x_TD: Tensor, noise_TE: Tensor | None = None, counted_T: Tensor | None = None
    ) -> FeedForwardOutput:
        y_TD, aux_loss_G, report_GE = self.routed_experts(x_TD, noise_TE, counted_T)
        return self.together(y_TD, x_TD), aux_loss_G, report_GE

    def for_inference(self, tokens: int) -> nn.Cell:
        """See ``FeedForward``."""
        return _SharedInference(self, self.routed_experts.for_inference(tokens))

    def gated_products(self) -> tuple[nn.Cell, ...]:
        """See ``FeedForward``."""
        return (*self.routed_experts.gated_products(), *self.shared_experts.gated_products())

    def keep_all_in_evaluation(self) -> None:
        """See ``FeedForward``."""
        self.routed_experts.keep_all_in_evaluation()


class _SharedInference(nn.Cell):
    """Inputs: x (T, D), valid (T) int32; output (T, D)."""

    def __init__(self, layer: SharedMoE, routed: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer, self.routed = layer, routed

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        return self.layer.together(self.routed(x_TD, valid_T), x_TD)
