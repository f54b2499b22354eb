# SPDX-License-Identifier: Apache-2.0
"""AdamW on MindSpore's fused Adam kernel and of plain operators, Adam without bias correction; whom a run takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.operations import AdamWeightDecay

from mindformers_ext.core.config.schedule import Schedule
from mindformers_ext.core.config.train import OptimizerSpec, ParameterGroup, group_of
from mindformers_ext.core.errors import Problems
from mindformers_ext.ms.schedule import ScheduledRate

_adam = P.Adam()
Scalars = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # beta1^t, beta2^t, beta1, beta2, eps
# what an update takes: scalars, learning rate, weight decay, whether it decays, parameter, both moments, gradient
KINDS = ("Tuple", "Tensor", "Tensor", "Bool", "Tensor", "Tensor", "Tensor", "Tensor")
_update = ops.MultitypeFuncGraph("fused_adamw")


@_update.register(*KINDS)
def _update_parameter(
    scalars: Scalars,
    lr: Tensor,
    weight_decay: Tensor,
    decays: bool,
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
) -> bool:
    """Decay, then Adam, of one parameter. ``eps`` comes scaled, see ``FusedAdamW``."""
    beta1_power, beta2_power, beta1, beta2, eps = scalars
    if decays:
        gradient = ops.depend(gradient, ops.assign(parameter, parameter * (1.0 - lr * weight_decay)))
    updated = _adam(
        parameter, mean, square, beta1_power, beta2_power, lr, beta1, beta2, eps, ops.cast(gradient, ms.float32)
    )
    return ops.depend(True, updated)


class _AdamW(nn.Optimizer):
    """What both forms of AdamW share: arguments, counters, float32 moments, one update per parameter.

    ``update`` of a form changes one parameter and takes what ``KINDS`` lists.
    """

    update: ops.MultitypeFuncGraph

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
        self.check_parameters(problems)
        problems.raise_if_any()
        self.beta1, self.beta2 = (Tensor(beta, ms.float32) for beta in betas)
        self.eps = Tensor(eps, ms.float32)
        self.means, self.squares = (float32_states(self._parameters, prefix) for prefix in ("adam_m", "adam_v"))
        self.decays = tuple(self.exec_weight_decay and bool(flag) for flag in self.decay_flags)
        self.increase = Tensor(np.ones(1, np.int32))

    def check_parameters(self, problems: Problems) -> None:
        """Add the parameters that this form cannot update: none."""

    def scaled_eps(self, beta2_power: Tensor) -> Tensor:
        """The eps that this form's ``update`` takes: as given."""
        return self.eps

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple:
        weight_decay = self.get_weight_decay()
        lr = self.get_lr()
        self.assignadd(self.global_step, self.increase)
        step = ops.cast(self.global_step, ms.float32).reshape(())
        beta1_power, beta2_power = ops.pow(self.beta1, step), ops.pow(self.beta2, step)
        scalars = (beta1_power, beta2_power, self.beta1, self.beta2, self.scaled_eps(beta2_power))
        state = (self.decays, self._parameters, self.means, self.squares, gradients)
        if self.is_group_lr:
            return self.hyper_map(ops.partial(self.update, scalars), lr, weight_decay, *state)
        if self.is_group:
            return self.hyper_map(ops.partial(self.update, scalars, lr), weight_decay, *state)
        return self.hyper_map(ops.partial(self.update, scalars, lr, weight_decay), *state)


class FusedAdamW(_AdamW):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW computes it), one kernel per parameter.

    For step t, gradient g and learning rate lr::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The kernel adds its eps to sqrt(v) before the correction, so it is given eps * sqrt(1 - beta2^t). State names are
    MindFormers' AdamW's (``adam_m.``, ``adam_v.``), so checkpoints resume with either. float32 parameters only:
    ``CompositeAdamW`` serves the others (such a form, MindFormers', was measured nine times slower on a CPU).

    Args:
        params: parameters or groups, as every MindSpore optimizer takes them.
        learning_rate: number or schedule.
        betas: decay of m and v, each in [0, 1).
        eps: above 0.
        weight_decay: at least 0; groups may have their own.

    Raises:
        UserError: lists every value out of range and every parameter that is not float32.
    """

    update = _update

    def check_parameters(self, problems: Problems) -> None:
        """Add the parameters that are not float32."""
        other = [parameter.name for parameter in self._parameters if parameter.dtype != ms.float32]
        if other:
            problems.add(f"{len(other)} parameters are not float32, first {other[0]}", "set param_init_type: float32")

    def scaled_eps(self, beta2_power: Tensor) -> Tensor:
        """What the kernel must add before the correction."""
        return self.eps * ops.sqrt(1.0 - beta2_power)


_composite = ops.MultitypeFuncGraph("composite_adamw")


@_composite.register(*KINDS)
def _update_composite(
    scalars: Scalars,
    lr: Tensor,
    weight_decay: Tensor,
    decays: bool,
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
) -> bool:
    """AdamW of one parameter of any type, in float32."""
    beta1_power, beta2_power, beta1, beta2, eps = scalars
    gradient = ops.cast(gradient, ms.float32)
    value = ops.cast(parameter, ms.float32)
    if decays:
        value = value * (1.0 - lr * weight_decay)
    new_mean = mean * beta1 + gradient * (1.0 - beta1)
    new_square = square * beta2 + gradient * gradient * (1.0 - beta2)
    bottom = ops.sqrt(new_square / (1.0 - beta2_power)) + eps
    value = value - new_mean / bottom * (lr / (1.0 - beta1_power))
    done = ops.depend(ops.assign(mean, new_mean), ops.assign(square, new_square))
    return ops.depend(True, ops.depend(ops.assign(parameter, ops.cast(value, parameter.dtype)), done))


class CompositeAdamW(_AdamW):
    """AdamW as ``FusedAdamW``, with its arguments, of plain operators: weights of any type, every device."""

    update = _composite


def float32_states(parameters: Iterable[Parameter], prefix: str) -> ParameterTuple:
    """Float32 zeros named ``<prefix>.<parameter>``, sharded like their parameter."""
    states = []
    for parameter in parameters:
        state = Parameter(initializer("zeros", parameter.shape, ms.float32), name=f"{prefix}.{parameter.name}")
        state.param_info = parameter.param_info.clone()
        if hasattr(parameter.param_info, "cloned_obj"):
            parameter.param_info.cloned_obj.append(state)
        else:
            parameter.param_info.cloned_obj = [state]
        state.is_init = False
        state.set_data(initializer("zeros", parameter.shape, ms.float32))
        state.name = f"{prefix}.{parameter.name}"
        states.append(state)
    return ParameterTuple(states)


class FP32StateAdamWeightDecay(nn.AdamWeightDecay):
    """Adam with decoupled weight decay, WITHOUT bias correction, and float32 moments whatever the weights' type.

    As in MindFormers r1.3-r1.5 (MindSpore's ``AdamWeightDecay`` with float32 state), for each parameter p with
    gradient g::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr * (m / (sqrt(v) + eps) + weight_decay p)

    It is not AdamW: m and v are not divided by 1 - beta^t, so the first steps are (1 - beta1) / sqrt(1 - beta2)
    of AdamW's size (3.2 times with 0.9 and 0.999, 0.45 times with 0.9 and 0.95). New YAMLs should use ``AdamW``.

    Args:
        params: parameters or groups, as every MindSpore optimizer takes them.
        learning_rate: number or schedule. Default 1e-3.
        beta1: decay of m, in (0, 1). Default 0.9.
        beta2: decay of v, in (0, 1). Default 0.999.
        eps: above 0. Default 1e-6.
        weight_decay: at least 0. Default 0.

    Raises:
        UserError: lists every value out of range.
    """

    def __init__(
        self,
        params: Any,
        learning_rate: Any = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        problems = Problems("optimizer FP32StateAdamWeightDecay")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < value < 1.0:
                problems.add(f"{name}={value} is out of range", "use a value between 0 and 1, both excluded")
        if not eps > 0.0:
            problems.add(f"eps={eps} is out of range", "use a value above 0")
        problems.raise_if_any()
        super(nn.AdamWeightDecay, self).__init__(learning_rate, params, weight_decay)
        self.beta1 = Tensor(np.array([beta1], np.float32))
        self.beta2 = Tensor(np.array([beta2], np.float32))
        self.eps = Tensor(np.array([eps], np.float32))
        self.moments1 = float32_states(self._parameters, "adam_m")
        self.moments2 = float32_states(self._parameters, "adam_v")
        self.fused_opt = AdamWeightDecay()
        # The fused kernel of the CPU takes float32 weights only; the composite form computes the same in float32.
        self.use_fused_opt = all(parameter.dtype == ms.float32 for parameter in self._parameters)


def parameter_groups(
    parameters: Iterable[Parameter], groups: tuple[ParameterGroup, ...], decay: float, rate: Callable[[float], Any]
) -> list[dict[str, Any]]:
    """MindSpore's groups of trainable parameters, in the order in which each kind first comes.

    ``rate`` gives that of a factor. Rates of their own have only groups whose ``lr_factor`` is not 1; where there is
    one, every group has.
    """
    found: dict[tuple[float, bool], list[Parameter]] = {}
    for parameter in parameters:
        group = group_of(parameter.name, groups)
        # two groups even where nothing decays: the order of parameters is that in which their norms are added
        found.setdefault((group.lr_factor, group.decays(len(parameter.shape))), []).append(parameter)
    has_rates = any(factor != 1.0 for factor, _ in found)
    return [
        {
            "params": held,
            "weight_decay": decay if decays else 0.0,
            **({"lr": rate(factor)} if has_rates else {}),
        }
        for (factor, decays), held in found.items()
    ]


def rate_of(schedule: Schedule, factor: float = 1.0) -> float | ScheduledRate:
    """What a MindSpore optimizer takes as its learning rate."""
    if schedule.kind == "ConstantWarmUpLR" and not schedule.warmup_steps:
        return schedule.learning_rate * factor
    return ScheduledRate(schedule, factor)


def build_optimizer(
    parameters: list[Parameter],
    spec: OptimizerSpec,
    schedule: Schedule,
    groups: tuple[ParameterGroup, ...] = (),
    fused: bool = True,
) -> nn.Optimizer:
    """The optimizer of a run over trainable ``parameters``; ``fused``: take one kernel where the weights allow it."""
    held = parameter_groups(parameters, groups, spec.weight_decay, partial(rate_of, schedule))
    rate = rate_of(schedule)
    if not spec.bias_correction:
        beta1, beta2 = spec.betas
        return FP32StateAdamWeightDecay(held, rate, beta1, beta2, spec.eps, spec.weight_decay)
    fits = fused and all(parameter.dtype == ms.float32 for parameter in parameters)
    return (FusedAdamW if fits else CompositeAdamW)(held, rate, spec.betas, spec.eps, spec.weight_decay)
