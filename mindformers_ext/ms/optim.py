# SPDX-License-Identifier: Apache-2.0
"""AdamW on MindSpore's fused Adam kernel."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.errors import Problems

_adam = P.Adam()
_update = ops.MultitypeFuncGraph("fused_adamw")


@_update.register(
    "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Bool", "Tensor", "Tensor", "Tensor", "Tensor"
)
def _update_parameter(
    beta1_power: Tensor,
    beta2_power: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    decays: bool,
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
) -> bool:
    """Decay, then Adam, of one parameter. ``eps`` comes scaled, see ``FusedAdamW``."""
    if decays:
        gradient = ops.depend(gradient, ops.assign(parameter, parameter * (1.0 - lr * weight_decay)))
    updated = _adam(
        parameter, mean, square, beta1_power, beta2_power, lr, beta1, beta2, eps, ops.cast(gradient, ms.float32)
    )
    return ops.depend(True, updated)


class FusedAdamW(nn.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW computes it), one kernel per parameter.

    For step t, gradient g and learning rate lr::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The kernel adds its eps to sqrt(v) before the correction, so it is given eps * sqrt(1 - beta2^t). State names are
    MindFormers' AdamW's (``adam_m.``, ``adam_v.``), so checkpoints resume with either. float32 parameters only:
    MindFormers' composite AdamW (measured nine times slower on CPU) serves the others.

    Args:
        params: parameters or groups, as every MindSpore optimizer takes them.
        learning_rate: number or schedule.
        betas: decay of m and v, each in [0, 1).
        eps: above 0.
        weight_decay: at least 0; groups may have their own.

    Raises:
        UserError: lists every value out of range and every parameter that is not float32.
    """

    def __init__(
        self,
        params: Any,
        learning_rate: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, params, weight_decay)
        problems = Problems("optimizer AdamW")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            problems.add(f"betas={list(betas)} is out of range", "give two numbers from 0 to below 1")
        if not eps > 0.0:
            problems.add(f"eps={eps} is out of range", "use a value above 0")
        other = [parameter.name for parameter in self._parameters if parameter.dtype != ms.float32]
        if other:
            problems.add(f"{len(other)} parameters are not float32, first {other[0]}", "set param_init_type: float32")
        problems.raise_if_any()
        self.beta1, self.beta2 = (Tensor(beta, ms.float32) for beta in betas)
        self.eps = Tensor(eps, ms.float32)
        self.means = self._parameters.clone(prefix="adam_m", init="zeros")
        self.squares = self._parameters.clone(prefix="adam_v", init="zeros")
        self.decays = tuple(self.exec_weight_decay and bool(flag) for flag in self.decay_flags)
        self.increase = Tensor(np.ones(1, np.int32))

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple:
        weight_decay = self.get_weight_decay()
        lr = self.get_lr()
        self.assignadd(self.global_step, self.increase)
        step = ops.cast(self.global_step, ms.float32).reshape(())
        beta1_power, beta2_power = ops.pow(self.beta1, step), ops.pow(self.beta2, step)
        eps = self.eps * ops.sqrt(1.0 - beta2_power)
        state = (self.decays, self._parameters, self.means, self.squares, gradients)
        if self.is_group_lr:
            update = ops.partial(_update, beta1_power, beta2_power, self.beta1, self.beta2, eps)
            return self.hyper_map(update, lr, weight_decay, *state)
        if self.is_group:
            update = ops.partial(_update, beta1_power, beta2_power, self.beta1, self.beta2, eps, lr)
            return self.hyper_map(update, weight_decay, *state)
        update = ops.partial(_update, beta1_power, beta2_power, self.beta1, self.beta2, eps, lr, weight_decay)
        return self.hyper_map(update, *state)
