# SPDX-License-Identifier: Apache-2.0
"""``FP32StateAdamWeightDecay``, the optimizer of the older Mixtral YAMLs; MindFormers dropped it after r1.5."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.common.initializer import initializer
from mindspore.ops.operations import AdamWeightDecay

from mindformers_ext.core.errors import Problems


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
        self.moments1 = self._states("adam_m")
        self.moments2 = self._states("adam_v")
        self.fused_opt = AdamWeightDecay()
        # The fused kernel of the CPU takes float32 weights only; the composite form computes the same in float32.
        self.use_fused_opt = all(parameter.dtype == ms.float32 for parameter in self._parameters)

    def _states(self, prefix: str) -> ParameterTuple:
        """Float32 zeros named ``<prefix>.<parameter>``, sharded like their parameter."""
        states = []
        for parameter in self._parameters:
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
