# SPDX-License-Identifier: Apache-2.0
"""task_arithmetic: out = b + lambda sum_m w_m (x_m - b), divided by sum_m w_m with ``normalize``.

Source: Ilharco et al. 2022, "Editing models with task arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.settings import Method, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import merge_task_vectors, task_parameters


def task_arithmetic(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the weighted task vectors."""
    return merge_task_vectors(stream, settings)


TASK_ARITHMETIC = Method("task_arithmetic", task_arithmetic, task_parameters(False, None))
