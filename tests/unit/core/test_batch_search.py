# SPDX-License-Identifier: Apache-2.0
"""The front of micro batch against recompute, and the range from equal to worst load: figures counted by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from mindformers_ext.core.cluster.batch_search import MOST, BatchFront, batch_front
from mindformers_ext.core.cluster.memory import (
    StepSettings,
    has_fixed_slots,
    layer_activations,
    layer_sizes,
    part_activations,
    stage_memory,
    worst_load,
)
from mindformers_ext.core.cluster.split_cost import repeated_share, stage_operations
from mindformers_ext.core.config.recompute import RecomputeSpec, recompute_from_yaml, recompute_words
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec
from tests.helpers.counted import DENSE, MOE

# Bytes of one sequence of DENSE: what a layer keeps (128 + 64 + 800 + 64 + 384), its input, its gated product, the
# logits; and all that does not depend on it.
LAYER, INPUT, PRODUCT, LOGITS = 1440, 64, 128, 1280
SELECT = frozenset({"swiglu"})


def experts(**changes: Any) -> NetworkSpec:
    return replace(MOE, model=replace(MOE.model, moe=replace(MOE.model.routing, **changes)))


def staying(spec: NetworkSpec, settings: StepSettings) -> int:
    (stage,) = stage_memory(spec, settings)
    return stage.total - stage.activations


def front_with(room: int, parts: frozenset[str] = SELECT) -> BatchFront:
    """Of DENSE, with so many bytes for activations."""
    return batch_front(DENSE, StepSettings(), staying(DENSE, StepSettings()) + room, parts)


def choices(front: BatchFront) -> list[tuple[int, int, bool]]:
    """Micro batch, layers that are computed again, whether parts of the others are."""
    return [
        (p.spec.batch_size, len(p.settings.recompute.layers), bool(p.settings.recompute.selected)) for p in front.points
    ]


def test_what_the_figures_below_are_counted_from() -> None:
    assert layer_activations(DENSE) == LAYER and part_activations(DENSE)["swiglu"] == PRODUCT
    (stage,) = stage_memory(DENSE, StepSettings())
    assert stage.activations == 4 * LAYER + LOGITS == 7040


@pytest.mark.parametrize(
    "room, expected",
    [
        (4 * LAYER + LOGITS, [(1, 0, False), (2, 4, False)]),  # 7040: twice 2976, with all layers again, fits too
        (4 * LAYER + LOGITS - 1, [(1, 0, True), (2, 4, False)]),  # the products are 3 * 128 bytes
        (4 * (LAYER - PRODUCT) + PRODUCT + LOGITS, [(1, 0, True), (2, 4, False)]),  # 6656
        (4 * (LAYER - PRODUCT) + PRODUCT + LOGITS - 1, [(1, 2, False), (2, 4, False)]),  # two layers: 5728
        (5700, [(1, 2, True)]),  # 2 * 1312 + 2 * 64 + 1440 + 1280 = 5472; twice 2976 is 5952
        (4 * INPUT + LAYER + LOGITS, [(1, 4, False)]),  # 2976
        (4 * INPUT + LAYER + LOGITS - 1, []),
    ],
)
def test_the_least_recompute_and_the_largest_micro_batch(room: int, expected: list[tuple[int, int, bool]]) -> None:
    front = front_with(room)
    assert choices(front) == expected and not front.by_rule
    assert front.largest == max((batch for batch, _, _ in expected), default=0)
    for point in front.points:
        assert point.memory.total <= staying(DENSE, StepSettings()) + room and point.worst == point.memory


def test_without_parts_only_whole_layers_are_computed_again() -> None:
    assert choices(front_with(4 * LAYER + LOGITS - 1, frozenset())) == [(1, 2, False), (2, 4, False)]


def test_the_share_that_is_repeated() -> None:
    """Per sequence a layer has 1792 (attention) + 3072 operations, the head 2048; backward takes two of each."""
    assert stage_operations(DENSE, StepSettings(RecomputeSpec(frozenset([0]))), 0) == (3 * (4 * 4864 + 2048), 4864)
    assert [point.repeated for point in front_with(4 * LAYER + LOGITS).points] == [
        0,
        pytest.approx(4 * 4864 / (3 * (4 * 4864 + 2048)), rel=1e-12),
    ]


@pytest.mark.parametrize("room", [9000, 17000, 26000, 35000])
def test_the_front_of_a_pipeline_is_what_trying_everything_finds(room: int) -> None:
    model = replace(MOE.model, num_hidden_layers=6)
    parallel = ParallelSpec(
        data_parallel=2, pipeline_stage=2, micro_batch_num=4, device_num=4, vocab_emb_dp=False, enable_alltoall=True
    )
    spec = replace(MOE, model=model, parallel=parallel)
    limit = max(stage.exact + stage.gathered for stage in stage_memory(spec, StepSettings())) + room
    front = batch_front(spec, StepSettings(), limit, SELECT)

    found: dict[int, tuple[float, int, int]] = {}
    every = frozenset(range(6))
    for batch, select, *counts in itertools.product(range(1, 12), ((), (("swiglu", every),)), range(4), range(4)):
        layers = frozenset([*range(counts[0]), *range(3, 3 + counts[1])])
        step = StepSettings(RecomputeSpec(layers, selected=select))
        if max(stage.total for stage in stage_memory(replace(spec, batch_size=batch), step)) <= limit:
            key = repeated_share(spec, step), sum(counts), len(select)
            found[batch] = min(found.get(batch, key), key)
    largest = max(found, default=0)
    sizes = {1, 2, 4, 8, largest} & set(found)
    kept = [b for b in sorted(sizes) if all(found[b] < found[more] for more in sizes if more > b)]
    assert front.largest == largest < 11
    assert [(point.spec.batch_size, point.recomputed) for point in front.points] == [(b, found[b]) for b in kept]


def test_a_rule_bounds_the_micro_batch_as_memory_does() -> None:
    front = batch_front(experts(max_router_load=24), StepSettings(), 10**12)
    assert front.largest == 3 and front.by_rule and choices(front) == [(3, 0, False)]  # 2 * 3 * 4 assignments
    assert batch_front(DENSE, StepSettings(), 10**18).largest == MOST


def test_the_micro_batch_of_the_file_is_one_of_the_choices() -> None:
    spec = replace(DENSE, batch_size=3)
    points = batch_front(spec, StepSettings(), staying(DENSE, StepSettings()) + 4 * 5952).points
    assert [point.spec.batch_size for point in points] == [3, 4, 8]  # 3 * 7040 fits, 4 * 7040 does not


def test_the_range_from_equal_to_worst_load() -> None:
    """4 tokens choose 2 of 4 experts: 8 rows when equally loaded; at the worst each has a slot for every token."""
    dropless = experts(capacity_factor=0.0)
    assert [layer_sizes(spec).slots for spec in (dropless, worst_load(dropless))] == [8, 16]
    (point,) = batch_front(dropless, StepSettings(), 10**9).points[:1]
    # 8 more rows in 4 layers: each is dispatched, multiplied thrice, and exchanged before and behind
    assert point.worst.total - point.memory.total == point.spec.batch_size * 4 * 8 * 2 * (8 + 3 * 16 + 2 * 8)


def test_grouped_experts_at_the_worst_are_all_on_one_device() -> None:
    """4 tokens of each of 4 devices choose 2 of 8 experts: 8 rows of each at equal load, with an empty one for every
    expert; a device of 2 experts may get both choices of all 16 tokens, of 1 expert one."""
    for devices, worst in ((2, 2 * 8), (4, 4 * 8), (8, 8 * 4)):
        parallel = ParallelSpec(data_parallel=devices, expert_parallel=devices, device_num=devices)
        spec = replace(experts(capacity_factor=0.0, use_gmm=True, num_local_experts=8), parallel=parallel)
        assert not has_fixed_slots(spec)
        sizes = [layer_sizes(each) for each in (spec, worst_load(spec))]
        assert [(each.slots, each.expert_rows) for each in sizes] == [(16, 16), (16, worst + 8)]
    cut = replace(spec, parallel=replace(parallel, model_parallel=2, use_seq_parallel=True, device_num=16))
    assert layer_sizes(cut).expert_rows == 2 * layer_sizes(cut).slots == 2 * (4 + 8)


@pytest.mark.parametrize("spec", [experts(capacity_factor=1.5), experts(capacity_factor=0.0, use_gmm=True), DENSE])
def test_a_load_that_changes_no_memory(spec: NetworkSpec) -> None:
    assert worst_load(spec) is spec


@pytest.mark.parametrize(
    "counts, selected, words",
    [
        ([0, 0], (), {"recompute": False, "select_recompute": False}),
        ([2, 2], (), {"recompute": True, "select_recompute": False}),
        ([2, 1], ("swiglu",), {"recompute": [2, 1], "select_recompute": True}),
        (
            [0, 1],
            ("attention", "swiglu"),
            {"recompute": [0, 1], "select_recompute": ["attention", r"feed_forward\.mul"]},
        ),
    ],
)
def test_words_of_recompute(counts: list[int], selected: tuple[str, ...], words: dict[str, Any]) -> None:
    spec = replace(DENSE, parallel=ParallelSpec(pipeline_stage=2, micro_batch_num=2, device_num=2))
    every = frozenset(range(4))
    layers = frozenset([*range(counts[0]), *range(2, 2 + counts[1])])
    found = RecomputeSpec(layers, selected=tuple((part, every) for part in selected))
    assert recompute_words(found, spec) == words
    assert recompute_from_yaml({"recompute_config": words}, spec) == found
