# SPDX-License-Identifier: Apache-2.0
"""Bytes one device of each pipeline stage needs for a training step, or for prediction.

Weights, accumulated gradients and optimizer states follow from the slices (``core.cluster.placement``) and are what a
compiled graph holds. Activations are an estimate: what every operator keeps for its gradient, counted from the shapes,
without what a memory planner adds or shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mindformers_ext.core.capacity import expert_capacity, rows_at_once
from mindformers_ext.core.cluster.placement import ADAM_STATES, OPTIMIZER_THRESHOLD, WIDTH, head_cuts, placed_parameters
from mindformers_ext.core.cluster.tensor_parallel import part_of, parted_parameters
from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.config.recompute import WHOLE, RecomputeSpec
from mindformers_ext.core.config.train import ParameterGroup
from mindformers_ext.core.layers import LayerSpec, MoESpec
from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.core.stages import open_parts

STATISTICS = 16  # floats that fused attention keeps per row: maximum and sum, eight lanes each


@dataclass(frozen=True)
class StepSettings:
    """What else decides about memory and traffic of a step.

    ``lora``: its adapters alone have gradients and optimizer states. ``accumulation_steps`` above 1 or a pipeline means
    that gradients are accumulated in memory of their own, which ``accumulation_is_cut`` cuts as the optimizer's states
    (``gradient_accumulation_shard``). ``pruning``: the network has masks. ``groups``: parameters that are trained in
    another way than the rest.
    """

    recompute: RecomputeSpec = field(default_factory=RecomputeSpec)
    threshold: int = OPTIMIZER_THRESHOLD
    accumulation_is_cut: bool = False
    accumulation_steps: int = 1
    lora: LoraSpec | None = None
    pruning: PruningSpec | None = None
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device of a stage. ``activations`` and ``gathered`` are estimated, the others exact.

    ``gathered``: weights of which a device keeps a part and gathers the whole for a step, in the computing type.
    ``cache``: keys and values of a prediction.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    cache: int = 0

    @property
    def exact(self) -> int:
        """Bytes that stay for the whole run."""
        return self.weights + self.gradients + self.optimizer + self.cache

    @property
    def total(self) -> int:
        """All of them."""
        return self.exact + self.activations + self.gathered


@dataclass(frozen=True)
class LayerSizes:
    """Numbers of one micro batch that a device handles in a layer.

    ``tokens``: rows of norms and routing; ``whole_tokens``: rows of attention, which sees whole sequences;
    ``slots``: expert rows before the exchange; ``expert_rows``: rows that its experts multiply.

    Rows that travel to their experts (``use_gmm``) follow from the load: they are as many as at equal load, or on the
    fullest device ``capacity_factor`` times as many (``worst_load``).
    """

    tokens: int
    whole_tokens: int
    slots: int
    expert_rows: int


def layer_sizes(spec: NetworkSpec, layer: int | None = None) -> LayerSizes:
    """The sizes of a layer of ``spec``, as ``cluster_rules.effective_spec`` leaves it; dropless counts as balanced.

    ``layer``: its number; None here and below is ``ModelSpec.typical_layer``.
    """
    parallel, moe = spec.parallel, _layer(spec, layer).moe
    whole = spec.batch_size * spec.seq_length
    cut = parallel.model_parallel if parallel.use_seq_parallel else 1
    tokens = whole // cut
    if moe is None:
        return LayerSizes(tokens, whole, 0, 0)
    if moe.use_gmm:
        return _grouped_sizes(spec, moe, tokens, whole, cut)
    if moe.capacity_factor > 0:
        capacity = expert_capacity(
            moe.num_experts_per_tok,
            tokens,
            moe.capacity_factor,
            moe.num_local_experts,
            parallel.router_model_parallel * moe.comp_comm_parallel_degree,
        )
        slots = moe.num_local_experts * capacity
    else:
        slots = moe.num_experts_per_tok * tokens
    return LayerSizes(tokens, whole, slots, slots * cut)


def _grouped_sizes(spec: NetworkSpec, moe: MoESpec, tokens: int, whole: int, cut: int) -> LayerSizes:
    """The same of sorted rows: K of each token, and where they travel an empty one for every expert."""
    rows = moe.num_experts_per_tok * tokens
    empty = moe.num_local_experts if spec.parallel.expert_parallel > 1 else 0
    return LayerSizes(tokens, whole, rows + empty, (round(rows * max(moe.capacity_factor, 1.0)) + empty) * cut)


def has_fixed_slots(spec: NetworkSpec) -> bool:
    """Whether the rows of a network's experts do not depend on their load: a capacity factor reserves its slots, and
    with ``use_gmm`` a device that has all experts multiplies K rows of every token."""
    moe = spec.model.moe
    return moe is None or moe.capacity_factor > 0 or (moe.use_gmm and spec.parallel.expert_parallel == 1)


def worst_load(spec: NetworkSpec) -> NetworkSpec:
    """``spec`` with as many slots as it needs when all tokens of a routing group go to the same experts.

    Dropless experts get as many slots each as the fullest of them needs (``ms.moe.slots``), at most one for every
    token: what a capacity factor of E reserves. With ``use_gmm`` over ``expert_parallel`` devices the fullest gets from
    each of them as many rows of every token as it has experts, at most K, where K / ``expert_parallel`` are its share;
    ``capacity_factor`` becomes that ratio.
    """
    moe, devices = spec.model.moe, spec.parallel.expert_parallel
    if moe is None or has_fixed_slots(spec):
        return spec
    factor = float(moe.num_local_experts)
    if moe.use_gmm:
        factor = devices * min(moe.num_local_experts // devices, moe.num_experts_per_tok) / moe.num_experts_per_tok
    moe = replace(moe, capacity_factor=factor)
    return replace(spec, model=replace(spec.model, moe=moe))


def _layer(spec: NetworkSpec, layer: int | None) -> LayerSpec:
    return _model_layer(spec.model, spec.model.typical_layer if layer is None else layer)


@lru_cache(maxsize=4096)  # searches ask for the same layers thousands of times
def _model_layer(model: ModelSpec, layer: int) -> LayerSpec:
    return model.layer(layer)


def stage_memory(spec: NetworkSpec, settings: StepSettings) -> tuple[StageMemory, ...]:
    """Memory of one device of every stage, by stage."""
    accumulates = spec.parallel.pipeline_stage > 1 or settings.accumulation_steps > 1
    placed = placed_parameters(spec, settings.threshold, settings.lora, settings.pruning, settings.groups)
    compute = WIDTH[spec.numerics.compute_dtype]
    result = []
    for stage in range(spec.parallel.pipeline_stage):
        here = [item for item in placed if item.stage == stage]
        weights = sum(item.nbytes for item in here)
        trained = [item for item in here if item.trained]
        states = ADAM_STATES * WIDTH["float32"] * sum(math.prod(item.local) for item in trained)
        if accumulates and not settings.accumulation_is_cut:
            gradients = sum(item.gathered_nbytes for item in trained)
        else:
            gradients = sum(item.nbytes for item in trained)
        gathered = sum(math.prod(item.gathered) * compute for item in here if item.local != item.gathered)
        result.append(
            StageMemory(stage, weights, gradients, states, stage_activations(spec, settings, stage), gathered)
        )
    return tuple(result)


def prediction_memory(spec: NetworkSpec, count: int, rows: int, length: int, positions: int) -> StageMemory:
    """Memory of one of ``count`` devices that answer together (``core.cluster.tensor_parallel``).

    Args:
        spec: the whole network, dropless.
        count: devices.
        rows: texts in the cache.
        length: tokens of the longest prompt.
        positions: tokens of the cache per text.
    """
    part, compute = part_of(spec, count), WIDTH[spec.numerics.compute_dtype]
    model, group = part.model, rows_at_once(rows, length)
    cache = 2 * rows * positions * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * compute
    weights = sum(item.nbytes for item in parted_parameters(spec, count))
    # one layer at a time; the logits of a group's last tokens or of one token per text, gathered and in float32
    graph = replace(part, batch_size=group, seq_length=length)
    activations = max(layer_activations(graph, layer) for layer in range(model.num_hidden_layers))
    logits = max(group, rows) * model.vocab_size * (2 * compute + 4)
    return StageMemory(0, weights, 0, 0, activations + logits, 0, cache)


def stage_activations(spec: NetworkSpec, settings: StepSettings, stage: int) -> int:
    """Estimated bytes of activations at the peak of a step: all micro batches that a stage keeps open, the layer whose
    gradient is being computed, and the logits on the last stage."""
    parallel = spec.parallel
    kept, once = 0, 0
    for layer in range(spec.model.num_hidden_layers):
        if spec.layer_stage(layer) == stage:
            masked = _masked(spec, layer) if settings.pruning else 0
            if layer in settings.recompute.layers:
                kept += _layer_input(spec, settings.recompute)
                again, named = [layer_activations(spec, layer) + masked], frozenset(WHOLE)
            else:
                parts, named = part_activations(spec, layer), settings.recompute.parts_of(layer)
                again = [parts[part] for part in named]
                kept += layer_activations(spec, layer) + masked - sum(again)
            once = max([once, *again])
            if not settings.recompute.exchanges:
                kept += sum(_exchanged(spec, part, layer) for part in named)
    pieces = parallel.pp_interleave_num
    open_now = open_parts(stage, parallel.pipeline_stage, pieces, max(parallel.micro_batch_num, 1))
    logits = _logits(spec) if stage == parallel.pipeline_stage - 1 else 0
    return parallel.micro_batch_interleave_num * (open_now * kept // pieces + logits) + once


def layer_activations(spec: NetworkSpec, layer: int | None = None) -> int:
    """Bytes that one layer keeps of one micro batch for its gradient."""
    residual = 2 * layer_sizes(spec).tokens * spec.model.hidden_size * WIDTH[spec.numerics.compute_dtype]
    return residual + sum(size for part, size in part_activations(spec, layer).items() if part != "swiglu")


def part_activations(spec: NetworkSpec, layer: int | None = None) -> dict[str, int]:
    """The same of each part of a layer (``core.config.recompute.PARTS``), without what it is given."""
    parallel, sizes, here = spec.parallel, layer_sizes(spec, layer), _layer(spec, layer)
    mp, number, hidden = parallel.model_parallel, WIDTH[spec.numerics.compute_dtype], spec.model.hidden_size
    queries = here.attention.num_attention_heads * here.attention.head_dim // mp
    keys = here.attention.num_key_value_heads * here.attention.head_dim // mp
    heads = here.attention.num_attention_heads // mp
    if spec.kernels.flash_attention:
        softmax = 4 * STATISTICS * heads * sizes.whole_tokens
    else:  # the softmax weights of half the square
        softmax = WIDTH[spec.numerics.softmax_dtype] * heads * sizes.whole_tokens * spec.seq_length // 2
    ffn, rows = here.feed_forward.intermediate_size or 0, sizes.whole_tokens
    feed_forward = 3 * sizes.whole_tokens * ffn // mp * number
    if here.moe is not None:
        rows = sizes.expert_rows
        feed_forward = number * (rows * (hidden + 3 * ffn // mp) + 2 * sizes.slots * hidden)
        feed_forward += 4 * 3 * sizes.tokens * here.moe.num_local_experts  # logits, probabilities, one-hot
        if here.moe.shared_expert:  # its hidden rows, its output before the gate, and the gate
            width, shared = here.moe.shared_expert.intermediate_size // mp, here.moe.shared_expert
            kept = 5 if shared.weighs_each else 3  # scores of the hidden values, and these weighed
            feed_forward += number * kept * sizes.whole_tokens * width
            feed_forward += number * sizes.tokens * (hidden + shared.num_experts)
    normed = number * sizes.tokens * hidden
    turned = 2 if here.attention.qk_norm else 1  # q and k before and after their norm are kept too
    return {
        "attention_norm": normed,
        # q, k, v, both turned, output
        "attention": number * sizes.whole_tokens * ((2 + turned) * queries + (2 + turned) * keys) + softmax,
        "ffn_norm": normed,
        "feed_forward": feed_forward,
        "swiglu": number * rows * (ffn // mp),
    }


def _masked(spec: NetworkSpec, layer: int) -> int:
    """Bytes of what a layer's masks multiply: what enters both output projections, and what leaves them."""
    sizes, here, mp = layer_sizes(spec, layer), _layer(spec, layer), spec.parallel.model_parallel
    wide = here.attention.num_attention_heads * here.attention.head_dim + (here.feed_forward.intermediate_size or 0)
    numbers = sizes.whole_tokens * wide // mp + 2 * sizes.tokens * spec.model.hidden_size
    return numbers * WIDTH[spec.numerics.compute_dtype]


def _exchanged(spec: NetworkSpec, part: str, layer: int) -> int:
    """Bytes of what a part has received from other devices, which stays where messages are not repeated."""
    parallel, sizes = spec.parallel, layer_sizes(spec, layer)
    numbers, rows, cut = 0, sizes.whole_tokens, sizes.tokens
    if part == "feed_forward" and _layer(spec, layer).moe is not None:
        numbers += 2 * sizes.slots if parallel.expert_parallel > 1 else 0
        rows = cut = sizes.expert_rows
    if part in WHOLE and parallel.model_parallel > 1:  # a gather and a sum, or the sum alone
        numbers += rows + cut if parallel.use_seq_parallel else rows
    return numbers * spec.model.hidden_size * WIDTH[spec.numerics.compute_dtype]


def _layer_input(spec: NetworkSpec, recompute: RecomputeSpec) -> int:
    sizes = layer_sizes(spec)
    rows = sizes.tokens
    if recompute.cut_inputs and not spec.parallel.use_seq_parallel:
        rows = sizes.whole_tokens // spec.parallel.model_parallel
    return rows * spec.model.hidden_size * WIDTH[spec.numerics.compute_dtype]


def _logits(spec: NetworkSpec) -> int:
    """Logits in the computing type, and in float32 with their gradient: there each device sees the whole vocabulary."""
    sizes, cuts = layer_sizes(spec), head_cuts(spec)
    numbers = (sizes.whole_tokens if cuts > 1 else sizes.tokens) * spec.model.vocab_size
    return numbers // cuts * WIDTH[spec.numerics.compute_dtype] + numbers * (4 + 4)
