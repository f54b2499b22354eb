# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer that a layer's description asks for."""

from __future__ import annotations

from mindformers_ext.core.spec import DenseSpec, LayerSpec, NetworkSpec
from mindformers_ext.pt.feed_forward import DenseFeedForward, FeedForward
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.moe.shared import SharedMixture


def build_feed_forward(spec: NetworkSpec, layer: LayerSpec) -> FeedForward:
    """Dense, a mixture, or a mixture with a shared expert; with fresh random weights."""
    wanted = layer.feed_forward
    if isinstance(wanted, DenseSpec):
        return DenseFeedForward(spec, wanted.intermediate_size)
    return SharedMixture(spec, wanted, wanted.shared_expert) if wanted.shared_expert else MoE(spec, wanted)
