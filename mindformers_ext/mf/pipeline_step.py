# SPDX-License-Identifier: Apache-2.0
"""MindFormers' train step for pipelines and accumulated gradients, with one exchange less."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, grad_scale, shard_grad_scale
from mindspore import Tensor, get_auto_parallel_context, nn, ops

from mindformers_ext.mf.noise import NoiseFed
from mindformers_ext.ms.l0 import climbing
from mindformers_ext.ms.step import signed

# What of MindFormers' step the one here leaves out; with any of them, MindFormers' own is taken.
LEFT_OUT = ("local_norm", "calculate_per_token_loss", "use_skip_data_by_global_norm")
DUMPS = ("dump_local_norm_path", "dump_device_local_norm")


class PortablePipelineStepCell(NoiseFed, MFPipelineWithLossScaleCell):
    """``MFPipelineWithLossScaleCell`` whose overflow check asks no other device.

    The norm for clipping is summed over all devices already, and is infinite or NaN on every one as soon as one
    gradient of one device is: it tells what MindFormers asks all devices once more. Arguments, accumulation and outputs
    are MindFormers' (wrapper/wrapper.py of 1.9.0).
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer, **others: Any) -> None:
        super().__init__(network, optimizer, **others)
        self.is_finite = ops.IsFinite()
        self.has_dynamic_lr, self.has_group_lr = bool(optimizer.dynamic_lr), bool(optimizer.is_group_lr)
        signs = climbing(optimizer.parameters)
        self.signs, self.climbs = tuple(float(signs.get(item.name, 1)) for item in self.weights), bool(signs)
        self.unscaled = shard_grad_scale if self.opt_shard else grad_scale  # both empty the accumulators

    @ops.composite.add_flags(has_effect=True)
    def construct(self, *inputs: Tensor) -> tuple[Any, ...]:
        """(loss, overflow, loss scale, learning rate, global norm) of one step."""
        scale = self.scale_sense
        loss, gradients, factor = self.grads_for_legacy(scale, *inputs)
        gradients = self.hyper_map(ops.partial(self.unscaled, scale * self.degree, factor), gradients, self.accu_grads)
        gradients, global_norm = self.clip_grad_norm(gradients)
        if self.climbs:
            gradients = self.hyper_map(signed, self.signs, gradients)
        rate = self.learning_rate
        if self.has_dynamic_lr:
            schedule = rate[0] if self.has_group_lr else rate
            rate = schedule(self.optimizer.global_step).reshape(())
        overflow = ops.logical_not(self.is_finite(global_norm)).reshape(())
        overflow = self.process_loss_scale(ops.depend(overflow, gradients))
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        return loss, overflow, scale.value(), rate, global_norm


def norm_tells_overflow(words: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the step here does all that ``runner_wrapper`` and the whole configuration ask of MindFormers'.

    Without clipping there is no norm; on devices that saturate (Ascend 910A, or by environment variable) an overflow
    leaves no infinity behind.
    """
    if not words.get("use_clip_grad", True) or any(words.get(name) or config.get(name) for name in LEFT_OUT):
        return False
    if os.environ.get("MS_ENABLE_GRACEFUL_EXIT") == "1" or any(get_auto_parallel_context(name) for name in DUMPS):
        return False
    return not saturates()


def saturates() -> bool:
    """Whether numbers that overflow on this device become the largest number instead of infinity."""
    from mindspore._c_expression import MSContext

    soc = MSContext.get_instance().get_ascend_soc_version()
    return soc == "ascend910" or os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE") == "SATURATION_MODE"
