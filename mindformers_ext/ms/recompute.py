# SPDX-License-Identifier: Apache-2.0
"""Layers, or parts of them, that compute their activations again in the backward pass, where the device's compiler
builds it."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import nn

from mindformers_ext.core.config.recompute import RecomputeSpec
from mindformers_ext.ms.causal_lm import CausalLM
from mindformers_ext.ms.layer import Layer

# The cells of each part, and whether they compute their outputs again too: that of a norm or of the gated product is
# what the next product keeps, whereas nobody keeps the output of attention or feed_forward.
CELLS: dict[str, tuple[Callable[[Layer], tuple[nn.Cell, ...]], bool]] = {
    "attention_norm": (lambda layer: (layer.attention_norm,), True),
    "attention": (lambda layer: (layer.attention,), False),
    "ffn_norm": (lambda layer: (layer.ffn_norm,), True),
    "feed_forward": (lambda layer: (layer.feed_forward,), False),
    "swiglu": (lambda layer: layer.feed_forward.gated_products(), True),
}


def recompute_layers(network: CausalLM, spec: RecomputeSpec) -> None:
    """Mark the layers of ``network`` that ``spec`` names, and the parts of others. Call it once, before the network is
    compiled.

    A layer's input is only cut where model parallel devices hold it alike; elsewhere MindSpore would gather it in
    groups of one device.
    """
    parallel = network.spec.parallel
    alike = parallel.model_parallel > 1 and not parallel.use_seq_parallel
    for index, layer in enumerate(network.model.layers):
        if index in spec.layers:
            layer.recompute(mp_comm_recompute=spec.exchanges, recompute_slice_activation=spec.cut_inputs and alike)
        for part in spec.parts_of(index):
            cells, with_output = CELLS[part]
            for cell in cells(layer):
                cell.recompute(output_recompute=with_output, mp_comm_recompute=spec.exchanges)
