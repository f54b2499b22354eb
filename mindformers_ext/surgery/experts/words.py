# SPDX-License-Identifier: Apache-2.0
"""The words of gates and scores, and the names of a gate's tensors below ``gate.``; no torch, for who only asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

MLP, LINEAR, RIDGE = KINDS = ("mlp", "linear", "ridge")  # of gates; a ridge gate is a linear one that is not trained
INITS = ("ridge", "weight", "random")  # what a gate that is trained starts from
TARGETS = ("chosen", "norm")  # what a ridge gate predicts
SCORED = ("plain", "positive", "l1_norm", "l2_norm")  # what of an expert's answers is summed (scores.CRITERIA)
OUTPUT_NORM = "output_norm"  # or the length of what it adds
FIRST, SECOND, ONLY, BIAS, NOISE = (
    "gate_network.0.weight",
    "gate_network.2.weight",
    "gate_network.weight",
    "gate_network.bias",
    "weight_noise.weight",
)
WEIGHTS: Mapping[str, tuple[str, ...]] = {MLP: (FIRST, SECOND), LINEAR: (ONLY,)}  # tensors of a network

# what of a neuron's values is summed over tokens
KERNELS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda v: v,
    "l1_norm": np.abs,
    "l2_norm": np.square,
}
