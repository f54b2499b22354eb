# SPDX-License-Identifier: Apache-2.0
"""``TopkBiasBalanceCallback``: ``jobs.train.hooks.BiasBalance`` between MindFormers' steps."""

from __future__ import annotations

from typing import Any

from mindformers.tools.logger import logger
from mindspore import nn

from mindformers_ext.jobs.train.hooks import BIAS, BiasBalance, TrainHook
from mindformers_ext.mf.hooks import HookCallback
from mindformers_ext.mf.networks import PortableLlamaForCausalLM


class MoETopkBiasBalanceCallback(HookCallback):
    """Moves the router's biases against the load after every step.

    MindFormers' callback visits only layers with shared experts, so Mixtral's bias never moves, and it expects a load
    that fits ``micro_batch_num`` even without a pipeline; a share needs neither.

    Args:
        topk_bias_update_rate: how far the bias moves in a step; 0 takes ``moe_config.topk_bias_update_rate``.
        given: MindFormers' other arguments; they follow from the network here.
    """

    def __init__(self, topk_bias_update_rate: float = 0.0, **given: Any) -> None:
        super().__init__()
        self.rate = topk_bias_update_rate

    def make(self, model: nn.Cell) -> list[TrainHook]:
        """The hook over the network's biases."""
        found = {item.name: item.asnumpy() for item in model.get_parameters() if item.name.endswith(BIAS)}
        if isinstance(model, PortableLlamaForCausalLM) and model.spec.model.moe and not self.rate:
            self.rate = model.spec.model.moe.topk_bias_update_rate
        if not found:
            logger.warning("TopkBiasBalanceCallback has nothing to do: moe_config.balance_via_topk_bias is False.")
        elif not self.rate:
            logger.warning("TopkBiasBalanceCallback moves nothing: topk_bias_update_rate is 0.")
        layers = sorted(found, key=lambda name: int(name.split(".")[2]))
        return [BiasBalance(self.rate, {name: found[name] for name in layers})]
