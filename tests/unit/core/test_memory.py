# SPDX-License-Identifier: Apache-2.0
"""Slices, memory and cost of a split: the arithmetic, against figures counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindformers_ext.core.cluster.memory import (
    StepSettings,
    layer_activations,
    layer_sizes,
    part_activations,
    stage_activations,
    stage_memory,
)
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.cluster.split_cost import expert_exchange, layer_operations, layer_sent, split_cost
from mindformers_ext.core.cluster.split_search import fitting_splits, step_rows
from mindformers_ext.core.config.recompute import RecomputeSpec, names_without_effect, recompute_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import KernelSpec, ModelSpec, NetworkSpec, NumericsSpec, ParallelSpec
from mindformers_ext.core.stages import layer_stage, open_parts

MODEL = ModelSpec(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    moe=MoESpec(num_local_experts=8, num_experts_per_tok=2, capacity_factor=1.1),
)
SEED = NetworkSpec(
    model=MODEL,
    seq_length=4096,
    numerics=NumericsSpec(compute_dtype="float16", param_dtype="float32"),
    kernels=KernelSpec(flash_attention=True),
    parallel=ParallelSpec(
        data_parallel=8,
        expert_parallel=8,
        pipeline_stage=2,
        micro_batch_num=16,
        enable_alltoall=True,
        vocab_emb_dp=False,
        enable_parallel_optimizer=True,
        device_num=16,
    ),
)
ALL_LAYERS = StepSettings(recompute=RecomputeSpec(frozenset(range(32))))


def cut(**sizes: Any) -> NetworkSpec:
    return replace(SEED, parallel=replace(SEED.parallel, **sizes))


def local(spec: NetworkSpec) -> dict[str, tuple[int, ...]]:
    return {item.name: item.local for item in placed_parameters(spec)}


def test_all_parameters_of_mixtral() -> None:
    assert sum(math.prod(item.whole) for item in placed_parameters(SEED)) == 46_702_792_704


def test_slices_of_the_seed() -> None:
    shapes = local(SEED)
    assert shapes["model.layers.0.feed_forward.ffn.w1.weight"] == (1, 14336, 4096)  # one expert, held by nobody else
    assert shapes["model.layers.0.attention.wq.weight"] == (512, 4096)  # cut by the optimizer over 8 devices
    assert shapes["model.layers.0.attention_norm.weight"] == (4096,)  # 16 KB, below its threshold
    assert shapes["lm_head.weight"] == (4000, 4096)


def test_slices_of_r17() -> None:
    spec = cut(data_parallel=2, model_parallel=4, expert_parallel=2, use_seq_parallel=True)
    found = {item.name: item for item in placed_parameters(spec)}
    assert found["model.layers.0.feed_forward.ffn.w1.weight"].local == (4, 3584, 4096)
    assert found["model.layers.0.feed_forward.ffn.w2.weight"].local == (4, 4096, 3584)
    assert found["model.layers.0.attention.wo.weight"].gathered == (4096, 1024)
    assert found["model.layers.0.attention.wo.weight"].local == (2048, 1024)
    assert {item.stage for item in found.values()} == {0, 1}


def test_memory_adds_up_to_the_whole() -> None:
    whole = sum(math.prod(item.whole) for item in placed_parameters(SEED))
    plain = replace(SEED, parallel=ParallelSpec())
    (stage,) = stage_memory(plain, StepSettings())
    assert stage.weights == 4 * whole and stage.optimizer == 8 * whole and stage.gathered == 0


def test_memory_of_the_seed_fits_58_gb() -> None:
    stages = stage_memory(SEED, ALL_LAYERS)
    assert [round(stage.total / 1e9, 1) for stage in stages] == [53.5, 54.2]
    assert stages[0].gradients > stages[0].weights  # accumulated gradients are not cut by the optimizer
    shared = stage_memory(SEED, replace(ALL_LAYERS, accumulation_is_cut=True))
    assert shared[0].gradients == shared[0].weights


def test_recompute_keeps_inputs_only() -> None:
    without, with_it = stage_activations(SEED, StepSettings(), 0), stage_activations(SEED, ALL_LAYERS, 0)
    inputs = 2 * 16 * 4096 * 4096 * 2  # two open micro batches, 16 layers, S x D in 16 bits
    assert with_it == inputs + layer_activations(SEED)
    assert without == 2 * 16 * layer_activations(SEED)


def test_sizes_of_a_layer() -> None:
    sizes = layer_sizes(SEED)
    assert sizes.tokens == sizes.whole_tokens == 4096 and sizes.slots == sizes.expert_rows == 8 * 1127
    cut_over_mp = layer_sizes(cut(data_parallel=2, model_parallel=4, expert_parallel=2, use_seq_parallel=True))
    assert cut_over_mp.tokens == 1024 and cut_over_mp.slots == 8 * 282 and cut_over_mp.expert_rows == 4 * 8 * 282


def test_bytes_of_an_exchange() -> None:
    assert expert_exchange(SEED) == 8 * 1127 * 4096 * 2
    assert layer_sent(SEED) == {"experts": 2 * round(8 * 1127 * 4096 * 2 * 7 / 8)}


def test_bytes_of_grouped_experts() -> None:
    """K rows of every token and one for each expert; of the sums over mp as many as each device has sent."""
    moe = replace(SEED.model.routing, use_gmm=True, capacity_factor=0.0)
    spec = replace(SEED, model=replace(SEED.model, moe=moe))
    rows = (2 * 4096 + 8) * 4096 * 2
    assert expert_exchange(spec) == rows and layer_sent(spec) == {"experts": 2 * round(rows * 7 / 8)}
    for own_rows in (False, True):
        sizes = cut(data_parallel=2, model_parallel=4, expert_parallel=2, use_seq_parallel=own_rows).parallel
        tokens = 4096 // (4 if own_rows else 1)
        attention, grouped = 4096 * 4096 * 2, (2 * tokens + 8) * 4096 * 2 * (4 if own_rows else 1)
        sent = layer_sent(replace(spec, parallel=sizes))
        assert sent["model parallel"] == 2 * round(attention * 3 / 4) + 2 * round(grouped * 3 / 4)


def test_cost() -> None:
    cost = split_cost(SEED, ALL_LAYERS)
    assert cost.bubble == pytest.approx(1 / 17)
    assert cost.sent["experts"] == 16 * 16 * 3 * layer_sent(SEED)["experts"]  # micro batches, layers, passes
    again = split_cost(SEED, StepSettings(recompute=RecomputeSpec(frozenset(range(32)), exchanges=False)))
    assert again.sent["experts"] * 3 == cost.sent["experts"] * 2
    assert split_cost(SEED, StepSettings()).operations < cost.operations


def interleaved(parts: int, **sizes: Any) -> NetworkSpec:
    return cut(pp_interleave_num=parts, pipeline_interleave=parts > 1, **sizes)


def test_interleaved_parts_take_turns() -> None:
    places = [interleaved(2).layer_stage(layer) for layer in range(32)]
    assert places == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert [layer_stage(layer, 5, 2, 2) for layer in range(5)] == [0, 0, 1, 0, 1]  # the odd layer is the first part's
    assert [layer_stage(layer, 5, 2) for layer in range(5)] == [0, 0, 0, 1, 1]
    found = {item.name: item.stage for item in placed_parameters(interleaved(2))}
    assert found["model.layers.8.attention.wq.weight"] == found["lm_head.weight"] == 1
    assert found["model.layers.16.attention.wq.weight"] == found["model.tok_embeddings.embedding_weight"] == 0


def test_interleaving_trades_messages_and_memory_for_waiting() -> None:
    plain, halves = split_cost(SEED, ALL_LAYERS), split_cost(interleaved(2), ALL_LAYERS)
    assert halves.bubble == pytest.approx(1 / 33) and halves.operations == plain.operations
    assert halves.sent["pipeline"] == 3 * plain.sent["pipeline"]  # forward, forward and back for each micro batch
    assert halves.sent["experts"] == plain.sent["experts"]
    # stage 0 keeps 2 micro batches of 16 layers, or 5 of 8 layers (2 + 2 ahead of the one at work)
    once = layer_activations(SEED)
    kept = [stage_activations(spec, ALL_LAYERS, 0) - once for spec in (SEED, interleaved(2))]
    assert kept[1] / kept[0] == pytest.approx(5 / 4)
    few = [open_parts(stage, 4, 2, 4) for stage in range(4)]
    assert few == [8, 8, 7, 5]  # never more than the 8 passes of a step


def test_half_batches_in_turn_double_the_work() -> None:
    plain, twice = split_cost(SEED, ALL_LAYERS), split_cost(cut(micro_batch_interleave_num=2), ALL_LAYERS)
    assert twice.operations == 2 * plain.operations and twice.sent["experts"] == 2 * plain.sent["experts"]
    assert twice.bubble == plain.bubble
    assert step_rows(cut(micro_batch_interleave_num=2), ALL_LAYERS) == 2 * step_rows(SEED, ALL_LAYERS)


def test_operations_do_not_depend_on_the_split() -> None:
    """Model parallel cuts a layer's products; the slots it rounds up are all that it adds."""
    one, four = (
        layer_operations(cut(data_parallel=8)),
        layer_operations(cut(data_parallel=2, model_parallel=4, use_seq_parallel=True)),
    )
    assert 4 * four == pytest.approx(one, rel=0.01)


def test_splits_that_fit() -> None:
    splits = fitting_splits(SEED, ALL_LAYERS, 64 * 10**9)
    assert splits[0].words["data_parallel"] == splits[0].words["expert_parallel"] == 8
    for split in splits:
        parallel = split.spec.parallel
        assert parallel.data_parallel * parallel.model_parallel * parallel.pipeline_stage == 16
        assert step_rows(split.spec, split.settings) == 128 and split.memory.total <= 64 * 10**9
    assert [split.cost.seconds for split in splits] == sorted(split.cost.seconds for split in splits)
    assert not fitting_splits(SEED, ALL_LAYERS, 8 * 10**9)
    parts = {
        (split.spec.parallel.pipeline_stage, split.spec.parallel.pp_interleave_num)
        for split in fitting_splits(interleaved(4), ALL_LAYERS, 64 * 10**9)
    }
    assert {(2, 4), (8, 4)} <= parts <= {(1, 1), (2, 4), (4, 4), (8, 4)}  # 16 stages have no 4 layers each


def recompute(words: Any, stages: int = 2, gmm: bool = False) -> RecomputeSpec:
    """Of four layers."""
    moe = replace(SEED.model.routing, use_gmm=gmm)
    model = replace(SEED.model, num_hidden_layers=4, moe=moe)
    spec = replace(SEED, model=model, parallel=replace(SEED.parallel, pipeline_stage=stages))
    return recompute_from_yaml({"recompute_config": words}, spec)


@pytest.mark.parametrize(
    "written, layers",
    [
        (True, range(4)),
        (False, ()),
        ([1, 1], (0, 2)),
        ([2], (0, 1)),
        ([0, True], (2, 3)),
    ],
)
def test_recompute_words(written: Any, layers: Any) -> None:
    spec = recompute({"recompute": written, "mp_comm_recompute": False})
    assert spec.layers == frozenset(layers) and not spec.exchanges


@pytest.mark.parametrize(
    "written, selected",
    [
        (True, {"swiglu": range(4)}),
        ([1, 0], {"swiglu": (0,)}),
        ([], {}),
        (["attention", r".*\.norm"], {"attention_norm": range(4), "attention": range(4), "ffn_norm": range(4)}),
        ({r"feed_forward\.mul": [2, 1], "feed_forward.w1.activation.silu": [1, 2]}, {"swiglu": range(4)}),
        ([r"feed_forward\.w1\.activation", r"feed_forward\.w2\.reshape"], {"swiglu": range(4)}),
        ({"feed_forward": [0, True], "attention": False}, {"attention": (), "feed_forward": (2, 3)}),
    ],
)
def test_selected_words(written: Any, selected: Any) -> None:
    spec = recompute({"select_recompute": written})
    assert spec.selected == tuple((part, frozenset(layers)) for part, layers in selected.items())
    assert not spec.layers and spec.is_on == any(map(len, selected.values()))


@pytest.mark.parametrize(
    "written, message",
    [
        ("attention", r"is no list: write True, or a list of names: \[attention\]"),
        ({"attention": 3}, "select_recompute: attention=3 is not understood"),
        ({"attention": [1, 2, 3]}, r"attention=\[1, 2, 3\] has 3 entries, pipeline_stage=2"),
        ([r"feed_forward\..*"], "'.*' may stand in the first word alone"),
        (["attention[_a]norm"], "is not understood"),
        (["feed_forward.w3"], "is no part of a layer here: choose among attention_norm, "),
        ([["attention"]], "is not understood"),
    ],
)
def test_selected_words_that_are_refused(written: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recompute({"select_recompute": written})


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_the_readme_s_example_reads(name: str, repo_root: Path) -> None:
    text = (repo_root / "research" / "mixtral" / name).read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```yaml\n")[1:] if "select_recompute" in block]
    spec = recompute_from_yaml(yaml.safe_load(example.partition("```")[0]), SEED)
    assert [part for part, layers in spec.selected if len(layers) == 32] == ["attention_norm", "ffn_norm", "swiglu"]


def test_a_whole_layer_has_no_parts_and_feed_forward_holds_its_product() -> None:
    words = {"recompute": [1], "select_recompute": {"feed_forward": True, "feed_forward.mul": True, "attention": [2]}}
    assert [sorted(recompute(words).parts_of(layer)) for layer in range(4)] == [
        [],
        ["attention", "feed_forward"],
        ["feed_forward"],
        ["feed_forward"],
    ]


def test_grouped_experts_keep_their_product() -> None:
    with pytest.raises(UserError, match="use_gmm makes a part of its experts: select feed_forward"):
        recompute({"select_recompute": True}, gmm=True)
    for words in (
        {"select_recompute": [0, 0]},
        {"select_recompute": True, "recompute": True},
        {"select_recompute": ["feed_forward", "feed_forward.mul"]},
    ):
        recompute(words, gmm=True)


def test_every_layer_of_parts_that_compile() -> None:
    spec = recompute({"select_recompute": {"attention": [1], "attention_norm": [0, 1], "feed_forward.mul": True}})
    every = frozenset(range(4))
    assert spec.for_every_layer(4).selected == (("attention", every), ("swiglu", every))


def test_what_the_parts_of_a_layer_keep() -> None:
    """Mixtral-8x7B, 4096 tokens in 16 bits, dp8 ep8: heads 32 and 8 of 128, 8 experts of 1127 slots."""
    parts = part_activations(SEED)
    assert parts["attention_norm"] == parts["ffn_norm"] == 4096 * 4096 * 2
    assert parts["swiglu"] == 8 * 1127 * 14336 * 2
    projected = 4096 * 3 * (32 + 8) * 128 * 2
    assert projected < parts["attention"] < parts["feed_forward"]
    assert parts["feed_forward"] == 8 * 1127 * (3 * 14336 + 3 * 4096) * 2 + 3 * 4096 * 8 * 4
    every = frozenset(range(32))
    for part in ("attention", "feed_forward", "swiglu"):
        settings = StepSettings(recompute=RecomputeSpec(selected=((part, every),)))
        kept = stage_activations(SEED, settings, 0)
        assert kept == 2 * 16 * (layer_activations(SEED) - parts[part]) + parts[part]


def test_names_that_keep_nothing_are_noted() -> None:
    config = {"recompute_config": {"select_recompute": {r"feed_forward\.w2\.reshape": True, "attention": True}}}
    assert names_without_effect(config) == [r"feed_forward\.w2\.reshape"]


def test_exchanges_that_are_not_repeated_are_kept() -> None:
    every, received = frozenset(range(32)), 2 * expert_exchange(SEED)
    for words in ({"layers": every}, {"selected": (("feed_forward", every),)}):
        again, kept = (StepSettings(recompute=RecomputeSpec(exchanges=repeats, **words)) for repeats in (True, False))
        assert stage_activations(SEED, kept, 0) - stage_activations(SEED, again, 0) == 2 * 16 * received


def test_parts_cost_what_they_repeat() -> None:
    every = frozenset(range(32))
    none, whole = split_cost(SEED, StepSettings()), split_cost(SEED, ALL_LAYERS)
    costs = {
        part: split_cost(SEED, StepSettings(recompute=RecomputeSpec(selected=((part, every),))))
        for part in ("attention", "feed_forward", "swiglu")
    }
    more = {part: cost.operations - none.operations for part, cost in costs.items()}
    assert more["swiglu"] == 0 and more["attention"] + more["feed_forward"] == whole.operations - none.operations
    assert more["attention"] == 16 * 16 * 2 * 4096 * (4096 * 2 * (32 + 8) * 128 + 4096 * 4096)  # micro batches, layers
    assert costs["feed_forward"].sent == whole.sent and costs["attention"].sent == none.sent


def test_what_the_parts_of_a_layer_send() -> None:
    """dp2 mp4 ep2 with sequence parallel: attention gathers and scatters its tokens, the experts all else."""
    spec = cut(data_parallel=2, model_parallel=4, expert_parallel=2, use_seq_parallel=True)
    attention, experts = layer_sent(spec, ("attention",)), layer_sent(spec, ("feed_forward",))
    assert attention == {"model parallel": 2 * 4096 * 4096 * 2 * 3 // 4}
    assert experts["experts"] == layer_sent(spec)["experts"] > 0
    assert experts["model parallel"] + attention["model parallel"] == layer_sent(spec)["model parallel"]
