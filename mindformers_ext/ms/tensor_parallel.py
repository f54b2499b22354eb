# SPDX-License-Identifier: Apache-2.0
"""One process's part of a network that several hold together (``core.cluster.tensor_parallel``)."""

from __future__ import annotations

from mindformers_ext.core.cluster.tensor_parallel import head_parts, part_of
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Linear
from mindformers_ext.ms.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.ms.strategies import Shards


def build_part(spec: NetworkSpec, count: int, rank: int = 0) -> CausalLM:
    """The part of ``spec`` in process ``rank`` of ``count``: its own forward pass gives incomplete sums, which
    ``ms.generate`` completes."""
    network = build_causal_lm(part_of(spec, count, rank))
    if head_parts(spec, count) > 1:
        model, whole = network.spec.model, network.lm_head.weight
        network.lm_head = Linear(
            model.hidden_size, model.vocab_size // count, model.initializer_range, whole.dtype, Shards(), "head"
        )
    return network
