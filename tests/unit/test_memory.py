# SPDX-License-Identifier: Apache-2.0
"""Slices, memory and cost of a split: the arithmetic, against figures counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindformers_ext.core.cluster import layer_stage, open_parts
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.memory import (
    StepSettings,
    layer_activations,
    layer_sizes,
    part_activations,
    stage_activations,
    stage_memory,
)
from mindformers_ext.core.placement import placed_parameters
from mindformers_ext.core.recompute import RecomputeSpec, recompute_from_yaml
from mindformers_ext.core.spec import KernelSpec, ModelSpec, MoESpec, NetworkSpec, NumericsSpec, ParallelSpec
from mindformers_ext.core.split_cost import expert_exchange, layer_operations, layer_sent, split_cost
from mindformers_ext.core.split_search import fitting_splits, step_rows

MODEL = ModelSpec(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, moe=MoESpec(num_local_experts=8, num_experts_per_tok=2, capacity_factor=1.1),
)  # fmt: skip
SEED = NetworkSpec(
    model=MODEL,
    seq_length=4096,
    numerics=NumericsSpec(compute_dtype="float16", param_dtype="float32"),
    kernels=KernelSpec(flash_attention=True),
    parallel=ParallelSpec(
        data_parallel=8, expert_parallel=8, pipeline_stage=2, micro_batch_num=16, enable_alltoall=True,
        vocab_emb_dp=False, enable_parallel_optimizer=True, device_num=16,
    ),
)  # fmt: skip
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
    one, four = layer_operations(cut(data_parallel=8)), layer_operations(cut(data_parallel=2, model_parallel=4,
                                                                             use_seq_parallel=True))  # fmt: skip
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
    parts = {(split.spec.parallel.pipeline_stage, split.spec.parallel.pp_interleave_num)
             for split in fitting_splits(interleaved(4), ALL_LAYERS, 64 * 10**9)}  # fmt: skip
    assert {(2, 4), (8, 4)} <= parts <= {(1, 1), (2, 4), (4, 4), (8, 4)}  # 16 stages have no 4 layers each


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
    spec = recompute_from_yaml({"recompute_config": {"recompute": written, "mp_comm_recompute": False}}, 4, 2)
    assert spec.layers == frozenset(layers) and not spec.exchanges


@pytest.mark.parametrize(
    "written, selected",
    [
        (True, {"swiglu": range(4)}),
        ([1, 0], {"swiglu": (0,)}),
        ([], {}),
        (["attention", r".*\.norm"], {"attention_norm": range(4), "attention": range(4), "ffn_norm": range(4)}),
        ({r"feed_forward\.mul": [2, 1], "feed_forward.w1.activation.silu": [1, 2]}, {"swiglu": range(4)}),
        ({"feed_forward": [0, True], "attention": False}, {"attention": (), "feed_forward": (2, 3)}),
    ],
)
def test_selected_words(written: Any, selected: Any) -> None:
    spec = recompute_from_yaml({"recompute_config": {"select_recompute": written}}, 4, 2)
    assert spec.selected == tuple((part, frozenset(layers)) for part, layers in selected.items())
    assert not spec.layers


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_the_readme_s_example_reads(name: str, repo_root: Path) -> None:
    text = (repo_root / "research" / "mixtral" / name).read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```yaml\n")[1:] if "select_recompute" in block]
    spec = recompute_from_yaml(yaml.safe_load(example.partition("```")[0]), 32, 2)
    assert [part for part, layers in spec.selected if len(layers) == 32] == ["attention_norm", "ffn_norm", "swiglu"]


def test_a_whole_layer_has_no_parts_and_feed_forward_holds_its_product() -> None:
    words = {"recompute": [1], "select_recompute": {"feed_forward": True, "feed_forward.mul": True, "attention": [2]}}
    spec = recompute_from_yaml({"recompute_config": words}, 4, 2)
    assert [sorted(spec.parts_of(layer)) for layer in range(4)] == [
        [], ["attention", "feed_forward"], ["feed_forward"], ["feed_forward"]]  # fmt: skip


def test_grouped_experts_keep_their_product() -> None:
    with pytest.raises(UserError, match="use_gmm makes a part of its experts: select feed_forward"):
        recompute_from_yaml({"recompute_config": {"select_recompute": True}, "moe_config": {"use_gmm": True}}, 4, 2)


def test_parts_add_up() -> None:
    """What is kept falls by what each part keeps; all parts leave what a layer adds to, twice."""
    parts = part_activations(SEED)
    normed = 4096 * 4096 * 2
    assert parts["attention_norm"] == parts["ffn_norm"] == normed and parts["swiglu"] == 8 * 1127 * 14336 * 2
    whole = parts["attention_norm"] + parts["attention"] + parts["ffn_norm"] + parts["feed_forward"]
    assert layer_activations(SEED) == whole + 2 * normed
    every = frozenset(range(32))
    for part in ("attention", "feed_forward", "swiglu"):
        settings = StepSettings(recompute=RecomputeSpec(selected=((part, every),)))
        kept = stage_activations(SEED, settings, 0)
        assert kept == 2 * 16 * (layer_activations(SEED) - parts[part]) + parts[part]


def test_parts_cost_what_they_repeat() -> None:
    every = frozenset(range(32))
    none, whole = split_cost(SEED, StepSettings()), split_cost(SEED, ALL_LAYERS)
    costs = {part: split_cost(SEED, StepSettings(recompute=RecomputeSpec(selected=((part, every),))))
             for part in ("attention", "feed_forward", "swiglu")}  # fmt: skip
    more = [costs[part].operations - none.operations for part in ("attention", "feed_forward")]
    assert sum(more) == pytest.approx(whole.operations - none.operations) and min(more) > 0
    assert costs["swiglu"].operations == none.operations
    assert costs["feed_forward"].sent == whole.sent and costs["attention"].sent == none.sent
