# SPDX-License-Identifier: Apache-2.0
"""A network held by several processes together, for prediction: each has some heads and a part of every expert's width.

Shoeybi et al. 2019 (arXiv:1909.08053), section 3: matrices that widen are cut by rows of the weight, those that narrow
by columns, so that a layer needs two sums over the processes and nothing else is exchanged. Router, norms and embedding
are whole everywhere. One process's part is a smaller network of the same kind, whose sums are not complete.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from mindformers_ext.core.cluster.cluster_rules import effective_spec
from mindformers_ext.core.cluster.placement import PlacedParameter, placed_parameters
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import SharedExpertSpec
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec

EMBEDDING = "embedding_weight"
ADDED_ONCE = (".attention.wo.bias", ".feed_forward.w2.bias")


def check_tensor_parallel(spec: NetworkSpec) -> list[str]:
    """Whether ``spec`` is cut as prediction on several devices is; ``core.cluster.cluster_rules`` judges the widths.

    Returns what has no effect there, one line each.

    Raises:
        UserError: another split than model_parallel over all devices.
    """
    parallel, devices = effective_spec(spec)[0].parallel, spec.parallel.device_num
    if spec.model.attn_experts and devices > 1:
        raise UserError("attention experts are not cut for prediction: use one process (--use_parallel False)")
    given = {
        name: getattr(parallel, name)
        for name in ("data_parallel", "model_parallel", "expert_parallel", "pipeline_stage")
    }
    wanted = {"data_parallel": 1, "model_parallel": devices, "expert_parallel": 1, "pipeline_stage": 1}
    if given == wanted:
        idle = [name for name in ("use_seq_parallel", "enable_parallel_optimizer") if getattr(parallel, name)]
        return [f"{name}=True has no effect on prediction" for name in idle]
    mode = "" if parallel.parallel_mode == "semi_auto_parallel" else ", with parallel.parallel_mode: 1"
    raise UserError(
        f"prediction cuts the network over all {devices} devices by model_parallel, here "
        + ", ".join(f"{name}={value}" for name, value in given.items())
        + ": set "
        + ", ".join(f"{name}: {value}" for name, value in wanted.items())
        + mode
    )


def part_of(spec: NetworkSpec, count: int, rank: int = 0) -> NetworkSpec:
    """The network of process ``rank`` of ``count``; its vocabulary is whole (``head_parts`` cuts the output layer)."""
    model, moe = spec.model, spec.model.moe
    if moe and moe.intermediate_size is not None:
        moe = replace(moe, intermediate_size=moe.intermediate_size // count)
    if moe and moe.expert_sizes:  # all are held as wide as the widest, and cut so
        own = (model.expert_size // count,) * moe.num_local_experts
        moe = replace(moe, expert_sizes=(own,) * model.num_hidden_layers)
    if moe and moe.shared_expert:
        moe = replace(moe, shared_expert=_shared_part(moe.shared_expert, model.num_hidden_layers, count, rank))
    part = replace(
        model,
        num_attention_heads=model.num_attention_heads // count,
        num_key_value_heads=model.num_key_value_heads // count,
        intermediate_size=max(model.intermediate_size // count, 1),  # no layer may have this width
        moe=moe,
    )
    return replace(spec, model=part, parallel=ParallelSpec())


def _shared_part(shared: SharedExpertSpec, layers: int, count: int, rank: int) -> SharedExpertSpec:
    """Of shared experts that are weighed each, one process holds some neurons of some, maybe none of others."""
    own, sizes = shared.intermediate_size // count, None
    if shared.weighs_each:
        start, end = own * rank, own * (rank + 1)
        ends = [list(accumulate(shared.sizes_of(layer), initial=0)) for layer in range(layers)]
        sizes = tuple(
            tuple(max(min(end, high) - max(start, low), 0) for low, high in pairwise(edges)) for edges in ends
        )
    return replace(shared, intermediate_size=own, expert_sizes=sizes)


def head_parts(spec: NetworkSpec, count: int) -> int:
    """Parts of the output layer: 1 where it is the embedding too, or where its rows cannot be shared out evenly."""
    return 1 if spec.model.tie_word_embeddings or spec.model.vocab_size % count else count


def parted_parameters(spec: NetworkSpec, count: int) -> tuple[PlacedParameter, ...]:
    """Every weight of ``spec`` with its part in one of ``count`` processes."""
    parallel = ParallelSpec(model_parallel=count, device_num=count, vocab_emb_dp=head_parts(spec, count) == 1)
    placed = placed_parameters(replace(spec, parallel=parallel))
    return tuple(
        replace(item, gathered=item.whole, local=item.whole) if item.name.endswith(EMBEDDING) else item
        for item in placed
    )


def own_part(weight: np.ndarray[Any, Any], placed: PlacedParameter, rank: int) -> np.ndarray[Any, Any]:
    """The part that process ``rank`` holds of a whole weight (of shape ``placed.whole``): a view.

    A bias that is added to a sum over the processes is the first one's; the others hold zeros.
    """
    if rank and placed.name.endswith(ADDED_ONCE):
        return np.zeros_like(weight)
    places = (
        slice(own * rank, own * (rank + 1)) if own < size else slice(None)
        for size, own in zip(placed.whole, placed.local, strict=True)
    )
    return weight[tuple(places)]
