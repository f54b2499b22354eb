# SPDX-License-Identifier: Apache-2.0
"""Shows per layer how evenly the experts are loaded and how many of their assignments are dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindformers.tools.logger import logger
from mindspore.train import Callback


class MoELoadMonitor(Callback):
    """One log line per layer: the share dropped, and the fullest and emptiest expert beside an even load.

    In place of MindFormers' ``MoEDropRateCallback``, which estimates the drop rate from parameters that are filled
    only while the "expert" loss is on. The figures are exact and those of the whole job: the train step adds up the
    load over all ranks and groups.

    Args:
        per_print_times: show every n-th step.
        given: MindFormers' ``expert_num``, ``capacity_factor``, ``num_layers`` and ``mtp_depth``; they follow from the
            network here.
    """

    def __init__(self, per_print_times: int = 1, **given: Any) -> None:
        super().__init__()
        self.every = max(1, int(per_print_times))
        self.is_told = False

    def on_train_step_end(self, run_context: Any) -> None:
        """Show the step just done."""
        parameters = run_context.original_args()
        if (parameters.cur_step_num - 1) % self.every:
            return
        outputs = parameters.net_outputs
        load = outputs[7].asnumpy() if isinstance(outputs, (tuple, list)) and len(outputs) >= 9 else np.zeros(())
        if load.ndim == 2 and load.shape[1] > 1:
            for line in load_lines(load, outputs[8].asnumpy()):
                logger.info("%s", line)
        elif not self.is_told:
            self.is_told = True
            logger.warning(
                "The expert load is not shown: it needs experts, our train step (PortableTrainOneStepCell) "
                "and one pipeline stage, because no stage sees the load of all layers."
            )


def load_lines(load: np.ndarray, dropped: np.ndarray) -> list[str]:
    """One line per layer. ``load`` (L, E): assignments per expert before dropping; ``dropped`` (L): their share."""
    lines = []
    for layer, (counts, share) in enumerate(zip(load, dropped.reshape(-1), strict=True)):
        even = max(float(counts.mean()), 1e-9)
        high, low = int(counts.argmax()), int(counts.argmin())
        lines.append(
            f"layer: {layer}, drop_rate: {float(share):.5f}, fullest expert: {high} "
            f"({counts[high] / even:.2f} of an even load), emptiest: {low} ({counts[low] / even:.2f})"
        )
    return lines
