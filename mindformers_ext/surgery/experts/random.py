# SPDX-License-Identifier: Apache-2.0
"""Neurons to experts by lot, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ext.surgery.experts.split import LayerSplit, expert_size


def random_split(width: int, experts: int, seed: int | Sequence[int]) -> LayerSplit:
    """``width`` neurons in ``experts`` groups of one size; ``UserError`` where that is no whole number."""
    labels = np.repeat(np.arange(experts), expert_size(width, experts))
    return LayerSplit.from_labels(np.random.default_rng(seed).permutation(labels), experts)
