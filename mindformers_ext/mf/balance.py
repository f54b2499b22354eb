# SPDX-License-Identifier: Apache-2.0
"""Balancing experts by a bias instead of a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3 section 2.1.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindformers.core.callback.callback import TopkBiasBalanceCallback
from mindformers.tools.logger import logger
from mindspore import Parameter, Tensor

from mindformers_ext.core.errors import UserError
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
from mindformers_ext.mf.step import real_model

BIAS = ".feed_forward.router.router.topk_bias"


class MoETopkBiasBalanceCallback(TopkBiasBalanceCallback):
    """After every step: bias += rate * sign(mean load - load), per layer, the load as a share of its sum.

    MindFormers' callback visits only layers with shared experts, so Mixtral's bias never moves, and it expects a load
    that fits ``micro_batch_num`` even without a pipeline; a share needs neither.

    Args:
        topk_bias_update_rate: how far the bias moves in a step; 0 takes ``moe_config.topk_bias_update_rate``.
        given: MindFormers' other arguments; they follow from the network here.
    """

    def __init__(self, topk_bias_update_rate: float = 0.0, **given: Any) -> None:
        super().__init__()  # without arguments: the base class only sets up TensorBoard
        self.rate = topk_bias_update_rate
        self.biases: list[Parameter] | None = None

    def on_train_step_end(self, run_context: Any) -> None:
        """Move the biases by the load of the step just done."""
        parameters = run_context.original_args()
        if self.biases is None:
            self.biases = self._find(real_model(parameters.train_network))
        if not self.biases:
            return
        outputs = parameters.net_outputs
        if not isinstance(outputs, (tuple, list)) or len(outputs) < 9:
            raise UserError(
                "TopkBiasBalanceCallback needs the load of every step: set runner_wrapper.type to "
                "PortableTrainOneStepCell"
            )
        if bool(np.any(outputs[1].asnumpy())):
            return  # the step was skipped, its load may be of broken activations
        for bias, load in zip(self.biases, outputs[7].asnumpy(), strict=True):
            bias.set_data(Tensor(moved(bias.asnumpy(), load, self.rate)))

    def _find(self, model: Any) -> list[Parameter]:
        found = {parameter.name: parameter for parameter in model.get_parameters() if parameter.name.endswith(BIAS)}
        if isinstance(model, PortableLlamaForCausalLM) and model.spec.model.moe and not self.rate:
            self.rate = model.spec.model.moe.topk_bias_update_rate
        if not found:
            logger.warning("TopkBiasBalanceCallback has nothing to do: moe_config.balance_via_topk_bias is False.")
        elif not self.rate:
            logger.warning("TopkBiasBalanceCallback moves nothing: topk_bias_update_rate is 0.")
        return [found[name] for name in sorted(found, key=lambda name: int(name.split(".")[2]))]


def moved(bias: np.ndarray, load: np.ndarray, rate: float) -> np.ndarray:
    """The bias (E) after one step of load (E): experts above the mean load go down by ``rate``, those below go up."""
    total = float(load.sum())
    if total <= 0:
        return bias
    share = load / total
    return (bias + rate * np.sign(1.0 / len(share) - share)).astype(bias.dtype)
