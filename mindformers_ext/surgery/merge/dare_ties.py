# SPDX-License-Identifier: Apache-2.0
"""dare_ties: task vectors thinned at random as in dare_linear, then the election of signs of ties.

Sources: Yu et al. 2023, arXiv 2311.03099; Yadav et al. 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindformers_ext.surgery.merge.dare_linear import bernoulli
from mindformers_ext.surgery.merge.settings import Method, Settings
from mindformers_ext.surgery.merge.stream import Stream
from mindformers_ext.surgery.merge.task_vectors import DENSITY, merge_task_vectors, task_parameters


def dare_ties(stream: Stream, settings: Settings) -> Iterator[torch.Tensor]:
    """Chunks of the base plus the sum of the thinned task vectors that agree with the elected sign."""
    return merge_task_vectors(stream, settings, bernoulli, elect=True)


DARE_TIES = Method("dare_ties", dare_ties, task_parameters(False, True, DENSITY), random=True)
