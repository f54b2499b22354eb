# SPDX-License-Identifier: Apache-2.0
"""Layers that compute their activations again in the backward pass, where the device's compiler builds it."""

from __future__ import annotations

from mindformers_ext.core.recompute import RecomputeSpec
from mindformers_ext.ms.causal_lm import CausalLM


def recompute_layers(network: CausalLM, spec: RecomputeSpec) -> None:
    """Mark the layers of ``network`` that ``spec`` names. Call it once, before the network is compiled.

    A layer's input is only cut where model parallel devices hold it alike; elsewhere MindSpore would gather it in
    groups of one device.
    """
    parallel = network.spec.parallel
    alike = parallel.model_parallel > 1 and not parallel.use_seq_parallel
    for index, layer in enumerate(network.model.layers):
        if index in spec.layers:
            layer.recompute(mp_comm_recompute=spec.exchanges, recompute_slice_activation=spec.cut_inputs and alike)
