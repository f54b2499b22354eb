# SPDX-License-Identifier: Apache-2.0
"""Our train step under MindFormers' wrapper arguments; the step itself is ``ms.step``."""

from __future__ import annotations

from typing import Any

from mindformers.tools.logger import logger
from mindspore import Tensor, nn

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.mf.networks import PortableLlamaForCausalLM
from mindformers_ext.mf.noise import NoiseFed
from mindformers_ext.ms.l0 import climbing
from mindformers_ext.ms.step import TrainStepCell

# Options of MFTrainOneStepCell that change the result and are not built, with the value that means off.
UNBUILT = {
    "local_norm": False,
    "calculate_per_token_loss": False,
    "use_skip_data_by_global_norm": False,
    "grouped_lr_scheduler": None,
}
# Arguments MindFormers hands to every wrapper that carry nothing for ours.
UNUSED = (
    "parallel_config",
    "global_norm_spike_threshold",
    "print_separate_loss",
    "lr_scheduler",
    "enable_check_overflow",  # of older files; the checks of a run have said so
)


class PortableTrainOneStepCell(NoiseFed, TrainStepCell):
    """``MFTrainOneStepCell`` on any device: same arguments, same first five outputs, our statistics after them.

    Args:
        network: the training network, possibly wrapped in MindFormers' tool cells.
        optimizer: the optimizer.
        use_clip_grad: clip the global gradient norm. Default False, as MindFormers'.
        max_grad_norm: the norm clipped to. Default 1.0.
        scale_sense: fixed loss scale, or a ``DynamicLossScaleUpdateCell``. Default 1.0.
        gradient_accumulation_steps: micro batches per step; our trainer fills it from ``runner_config``.
        others: what MindFormers passes to every wrapper.

    Raises:
        UserError: for an option of MindFormers' step that is not built here.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: nn.Optimizer,
        use_clip_grad: bool = False,
        max_grad_norm: float = 1.0,
        scale_sense: float | Tensor | nn.Cell = 1.0,
        gradient_accumulation_steps: int = 1,
        **others: Any,
    ) -> None:
        _check(others)
        if isinstance(scale_sense, Tensor):
            scale_sense = float(scale_sense.asnumpy())
        model = real_model(network)
        is_ours = isinstance(model, PortableLlamaForCausalLM)
        if is_ours:
            model.report_terms()
        super().__init__(
            network,
            optimizer,
            scale_sense,
            max_grad_norm if use_clip_grad else None,
            gradient_accumulation_steps,
            climbing(optimizer.parameters),
            copies_of(model.spec.parallel) if is_ours else 1,
        )
        logger.info(
            "Train step: portable; overflow is a gradient norm that is not finite; clip %s; %d micro batches.",
            max_grad_norm if use_clip_grad else "off",
            gradient_accumulation_steps,
        )


def real_model(network: nn.Cell) -> nn.Cell:
    """The model inside MindFormers' and MindSpore's wrapping cells."""
    while True:
        inner = getattr(network, "network", None) or getattr(network, "_backbone", None)
        if inner is None:
            return network
        network = inner


def copies_of(parallel: ParallelSpec) -> int:
    """Devices that each have the whole loss: those of a pipeline stage of a cut graph, otherwise 1."""
    cut = parallel.parallel_mode in SHARDED_MODES
    return parallel.device_num // parallel.pipeline_stage if cut else 1


def _check(others: dict[str, Any]) -> None:
    problems = Problems("runner_wrapper")
    for name, value in others.items():
        if name in UNBUILT and value not in (UNBUILT[name], None):
            problems.add(f"{name}={value!r} is not built in the portable train step", f"set it to {UNBUILT[name]}")
    problems.unknown_keys(
        "runner_wrapper",
        others,
        (*UNBUILT, *UNUSED, "use_clip_grad", "max_grad_norm", "scale_sense", "gradient_accumulation_steps"),
    )
    problems.raise_if_any()
