# SPDX-License-Identifier: Apache-2.0
"""What a split costs per step: arithmetic, bytes sent, and the time in which a pipeline's stages wait.

The model: seconds = (operations / ``OPERATIONS`` + bytes sent / ``LINK``) / (1 - bubble), for the busiest stage, with
bubble = (stages - 1) / (micro batches * parts + stages - 1) of a one-forward-one-backward schedule in which every stage
has that many parts of the network (``pp_interleave_num``; Narayanan et al. 2021, arXiv:2104.04473, section 2.2) and
ring algorithms (``core.cluster.traffic``). It puts splits in order; it is no prediction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from mindformers_ext.core.cluster.memory import StepSettings, layer_sizes
from mindformers_ext.core.cluster.placement import WIDTH, placed_parameters
from mindformers_ext.core.cluster.traffic import sent_bytes
from mindformers_ext.core.config.recompute import WHOLE
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.core.stages import stage_messages

OPERATIONS = 140e12  # matrix operations a second that one device reaches in training, an assumption
LINK = 25e9  # bytes a second that one device sends to the others, an assumption
ASSUMPTIONS = (
    f"seconds = (operations / {OPERATIONS / 1e12:.0f} TFLOP/s + bytes sent / {LINK / 1e9:.0f} GB/s) / "
    "(1 - bubble), bubble = (stages - 1) / (micro batches * pp_interleave_num + stages - 1)"
)


@dataclass(frozen=True)
class SplitCost:
    """Of one device of the busiest stage in one step. ``sent``: bytes by purpose."""

    operations: float
    sent: dict[str, int]
    bubble: float

    @property
    def sent_total(self) -> int:
        """All bytes that it sends."""
        return sum(self.sent.values())

    @property
    def seconds(self) -> float:
        """By the model of this file."""
        return (self.operations / OPERATIONS + self.sent_total / LINK) / (1 - self.bubble)


def split_cost(spec: NetworkSpec, settings: StepSettings) -> SplitCost:
    """The cost of the split of ``spec``, as ``core.cluster.cluster_rules.effective_spec`` leaves it."""
    parallel = spec.parallel
    batches = _micro_batches(spec, settings) * parallel.micro_batch_interleave_num
    costs = [_stage_cost(spec, settings, stage, batches) for stage in range(parallel.pipeline_stage)]
    operations, sent = max(costs, key=lambda cost: cost[0] / OPERATIONS + sum(cost[1].values()) / LINK)
    return SplitCost(operations, dict(sent), pipeline_bubble(spec, settings))


def pipeline_bubble(spec: NetworkSpec, settings: StepSettings) -> float:
    """The share of a step in which a stage waits for others."""
    others = spec.parallel.pipeline_stage - 1
    return others / (_micro_batches(spec, settings) * spec.parallel.pp_interleave_num + others)


def repeated_share(spec: NetworkSpec, settings: StepSettings) -> float:
    """How many more products the busiest stage computes for ``settings.recompute``: 0 none, about 1/3 a whole forward
    pass again."""
    stages = [stage_operations(spec, settings, stage) for stage in range(spec.parallel.pipeline_stage)]
    return max(once + again for once, again in stages) / max(once for once, _ in stages) - 1


def stage_operations(spec: NetworkSpec, settings: StepSettings, stage: int) -> tuple[int, int]:
    """Operations of a stage's products on one device for one micro batch, forward and backward, and those repeated for
    ``settings.recompute``."""
    once = head_operations(spec) if stage == spec.parallel.pipeline_stage - 1 else 0
    repeated = 0
    for layer in _layers_of(spec, stage):
        once += layer_operations(spec, layer=layer)
        repeated += layer_operations(spec, _repeated_parts(settings, layer), layer)
    return 3 * once, repeated  # backward takes two


def _micro_batches(spec: NetworkSpec, settings: StepSettings) -> int:
    return spec.parallel.micro_batch_num if spec.parallel.pipeline_stage > 1 else settings.accumulation_steps


def _layers_of(spec: NetworkSpec, stage: int) -> list[int]:
    return [layer for layer in range(spec.model.num_hidden_layers) if spec.layer_stage(layer) == stage]


def _repeated_parts(settings: StepSettings, layer: int) -> Collection[str]:
    return WHOLE if layer in settings.recompute.layers else settings.recompute.parts_of(layer)


def _stage_cost(spec: NetworkSpec, settings: StepSettings, stage: int, micro: int) -> tuple[float, Counter[str]]:
    stages, parts = spec.parallel.pipeline_stage, spec.parallel.pp_interleave_num
    operations = micro * sum(stage_operations(spec, settings, stage))
    sent: Counter[str] = Counter()
    for layer in _layers_of(spec, stage):
        again = _repeated_parts(settings, layer)
        for purpose, size in layer_sent(spec, layer=layer).items():
            sent[purpose] += micro * 2 * size  # forward, and backward as much again
        for purpose, size in layer_sent(spec, again if settings.recompute.exchanges else (), layer).items():
            sent[purpose] += micro * size
    if stages > 1:
        numbers = layer_sizes(spec).tokens * spec.model.hidden_size * WIDTH[spec.numerics.compute_dtype]
        sent["pipeline"] += micro * numbers * stage_messages(stage, stages, parts)
    sent["gradients"] += gradient_sent(spec, settings, stage)
    return operations, sent


def layer_operations(spec: NetworkSpec, parts: Collection[str] = WHOLE, layer: int | None = None) -> int:
    """Two per multiplication and addition of one layer's products, forward, one micro batch, one device; of ``parts``
    alone. ``layer``: its number, None is ``ModelSpec.typical_layer``."""
    model, sizes, mp = spec.model, layer_sizes(spec, layer), spec.parallel.model_parallel
    here = model.layer(model.typical_layer if layer is None else layer)
    hidden, ffn = model.hidden_size, here.feed_forward.intermediate_size or 0
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    total = 0
    if "attention" in parts:
        total += 2 * sizes.whole_tokens * hidden * (2 * queries + 2 * keys) // mp
        total += 2 * sizes.whole_tokens * spec.seq_length * queries // mp  # half of the square, twice
    if "feed_forward" not in parts:
        return total
    if here.moe is None:
        return total + 2 * 3 * sizes.whole_tokens * hidden * ffn // mp
    total += 2 * sizes.tokens * hidden * here.moe.num_local_experts
    total += 2 * 3 * sizes.expert_rows * hidden * ffn // mp
    if here.moe.shared_expert:
        total += 2 * 3 * sizes.whole_tokens * hidden * here.moe.shared_expert.intermediate_size // mp
        shared = here.moe.shared_expert
        logits = (shared.num_experts if shared.weighs_each else shared.gated) + 2 * shared.use_weighting
        total += 2 * sizes.tokens * hidden * logits
    return total


def head_operations(spec: NetworkSpec) -> int:
    """The same for the output layer."""
    parallel, model, sizes = spec.parallel, spec.model, layer_sizes(spec)
    rows = sizes.tokens if parallel.use_seq_parallel else sizes.whole_tokens
    return 2 * rows * model.hidden_size * model.vocab_size


def layer_sent(spec: NetworkSpec, parts: Collection[str] = WHOLE, layer: int | None = None) -> dict[str, int]:
    """Bytes that one device sends in one layer's forward pass of one micro batch, by purpose; for ``parts`` alone.

    ``layer``: its number, None is ``ModelSpec.typical_layer``.
    """
    parallel, sizes, hidden = spec.parallel, layer_sizes(spec, layer), spec.model.hidden_size
    mp, ep, number = parallel.model_parallel, parallel.expert_parallel, WIDTH[spec.numerics.compute_dtype]
    moe = spec.model.layer(spec.model.typical_layer if layer is None else layer).moe
    sent = {}
    if moe and ep > 1 and "feed_forward" in parts:
        sent["experts"] = 2 * sent_bytes("AlltoAll", expert_exchange(spec, layer), ep)
    if mp > 1:
        attention, rows = sizes.whole_tokens * hidden * number, sizes.expert_rows * hidden * number
        # with use_seq_parallel a gather before attention and a scattering sum behind; experts' rows are gathered and
        # summed everywhere, grouped ones where they came from, a shared expert's as those of attention
        gathers = parallel.use_seq_parallel
        dense = [("AllGather", attention), ("ReduceScatter", attention)] if gathers else [("AllReduce", attention)]
        summed = "ReduceScatter" if gathers and moe and moe.use_gmm else "AllReduce"
        experts = [("AllGather", rows)] * gathers + [(summed, rows)]
        if moe is None:  # its sum is not scattered
            experts = [("AllGather", attention)] * gathers + [("AllReduce", attention)]
        rings = {
            "attention": dense,
            "feed_forward": experts + (dense if moe and moe.shared_expert else []),
        }
        sent["model parallel"] = sum(
            sent_bytes(kind, size, mp) for part in rings if part in parts for kind, size in rings[part]
        )
    return sent


def expert_exchange(spec: NetworkSpec, layer: int | None = None) -> int:
    """Bytes of one exchange of expert rows on one device: a routing group's slots in the computing type."""
    return layer_sizes(spec, layer).slots * spec.model.hidden_size * WIDTH[spec.numerics.compute_dtype]


def gradient_sent(spec: NetworkSpec, settings: StepSettings, stage: int) -> int:
    """Bytes for summing gradients (and gathering the weights that the optimizer's cut keeps in parts), once a step."""
    devices = spec.parallel.data_parallel * spec.parallel.model_parallel
    total = 0
    for item in placed_parameters(spec, settings.threshold, settings.lora, settings.pruning):
        if item.stage == stage and item.trained:
            copies = devices // max(math.prod(item.whole) // math.prod(item.gathered), 1)
            total += sent_bytes("AllReduce", item.gathered_nbytes, copies)
    return total
