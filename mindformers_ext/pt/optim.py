# SPDX-License-Identifier: Apache-2.0
"""Adam with decoupled weight decay over many tensors at once, float32 moments whatever the weights' type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindformers_ext.core.config.train import DEFAULT_GROUP, OptimizerSpec, ParameterGroup


class Adam:
    """For step t, gradient g and learning rate lr::

        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        AdamW:           p = p (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        no correction:   p = p (1 - lr decay) - lr m / (sqrt(v) + eps)

    ``means`` and ``squares`` belong to ``parameters`` by place, and so do ``groups``: how each parameter is trained, by
    default as all others; lr is then lr times the group's factor, and g its sign times g.
    """

    def __init__(
        self, parameters: list[Tensor], spec: OptimizerSpec, groups: Sequence[ParameterGroup] | None = None
    ) -> None:
        self.parameters, self.spec = parameters, spec
        self.means = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self._alike: dict[tuple[float, int, bool], list[int]] = {}
        for place, parameter in enumerate(parameters):
            group = groups[place] if groups else DEFAULT_GROUP
            kind = group.lr_factor, group.sign, group.decays(parameter.dim())
            self._alike.setdefault(kind, []).append(place)

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float, number: int) -> None:
        """One update; ``number`` counts from 1. Gradients are float32 and may be used up."""
        for (factor, sign, decays), chosen in self._alike.items():
            if sign < 0:
                torch._foreach_neg_([gradients[i] for i in chosen])
            self._update(chosen, gradients, rate * factor, number, self.spec.weight_decay if decays else 0.0)

    def _update(self, chosen: list[int], every_gradient: list[Tensor], rate: float, number: int, decay: float) -> None:
        parameters, gradients, means, squares = (
            [each[i] for i in chosen] for each in (self.parameters, every_gradient, self.means, self.squares)
        )
        beta1, beta2 = self.spec.betas
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        correction1 = 1.0 - beta1**number if self.spec.bias_correction else 1.0
        correction2 = 1.0 - beta2**number if self.spec.bias_correction else 1.0
        bottom = torch._foreach_div(squares, correction2)
        torch._foreach_sqrt_(bottom)
        torch._foreach_add_(bottom, self.spec.eps)
        values = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        if decay:
            torch._foreach_mul_(values, 1.0 - rate * decay)
        torch._foreach_addcdiv_(values, means, bottom, -rate / correction1)
        for parameter, value in zip(parameters, values, strict=True):
            if parameter is not value:
                parameter.copy_(value)
