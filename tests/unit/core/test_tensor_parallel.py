# SPDX-License-Identifier: Apache-2.0
"""A network held by several processes: whose part is what, what it takes, and how it may be cut."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.core.capacity import rows_at_once
from mindformers_ext.core.cluster.memory import prediction_memory
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.cluster.tensor_parallel import head_parts, own_part, part_of, parted_parameters
from mindformers_ext.core.config.overrides import apply_overrides
from mindformers_ext.core.config.run import run_spec_from_yaml
from mindformers_ext.core.config.view import network_spec_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import DeviceSpec, ModelSpec, NetworkSpec
from mindformers_ext.jobs.dryrun.plan import plan_dry_run
from mindformers_ext.jobs.predict.generate import Shape
from mindformers_ext.jobs.predict.network import check_memory

ROOT = Path(__file__).resolve().parents[3]
PREDICT = ROOT / "research" / "mixtral" / "mixtral_8x7b" / "predict_mixtral-8x7b.yaml"
SPEC = network_spec_from_yaml(yaml.safe_load(PREDICT.read_text(encoding="utf-8")), 8)


def words(**changes: Any) -> dict[str, Any]:
    """The 8x7B file with keys changed; ``__`` stands for a dot."""
    pairs = [(key.replace("__", "."), str(value)) for key, value in changes.items()]
    return apply_overrides(copy.deepcopy(yaml.safe_load(PREDICT.read_text(encoding="utf-8"))), pairs)


def networks() -> st.SearchStrategy[NetworkSpec]:
    """Small networks, with and without experts and an output layer of their own."""

    def network(groups: int, shared: int, width: int, ffn: int, vocab: int, experts: int, tied: bool) -> NetworkSpec:
        own = SharedExpertSpec(intermediate_size=24, weighs_each=True, num_experts=3) if shared > 1 else None
        moe = MoESpec(num_local_experts=experts, num_experts_per_tok=1, shared_expert=own) if experts else None
        return NetworkSpec(
            seq_length=8,
            model=ModelSpec(
                vocab_size=vocab,
                hidden_size=24,
                intermediate_size=12 * ffn,
                num_hidden_layers=2,
                num_attention_heads=12 * groups * shared,
                num_key_value_heads=12 * groups,
                head_dim=width,
                tie_word_embeddings=tied,
                moe=moe,
            ),
        )

    return st.builds(
        network,
        st.integers(1, 2),
        st.integers(1, 3),
        st.sampled_from([2, 4]),
        st.integers(1, 3),
        st.integers(10, 40),
        st.sampled_from([0, 3, 4]),
        st.booleans(),
    )


@given(networks(), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_parts_make_the_whole_and_are_the_shapes_of_a_smaller_network(spec: NetworkSpec, count: int) -> None:
    part = {item.name: item.whole for item in placed_parameters(part_of(spec, count))}
    for item in parted_parameters(spec, count):
        whole = np.arange(math.prod(item.whole)).reshape(item.whole)
        own = [own_part(whole, item, rank) for rank in range(count)]
        assert {piece.shape for piece in own} == {item.local}
        cut = [axis for axis, (all_, here) in enumerate(zip(item.whole, item.local, strict=True)) if all_ != here]
        if cut:
            (axis,) = cut
            assert np.array_equal(np.concatenate(own, axis), whole)
        else:
            assert all(np.array_equal(piece, whole) for piece in own)
        if not item.name.startswith("lm_head"):
            assert item.local == part[item.name]
        else:
            assert item.local[0] * head_parts(spec, count) == spec.model.vocab_size


def test_memory_of_a_device_follows_from_the_shapes() -> None:
    model, positions, rows = SPEC.model, 4096, 3
    found = prediction_memory(
        replace(SPEC, model=replace(model, moe=replace(model.routing, capacity_factor=0.0))), 8, rows, 2048, positions
    )
    shared = 32000 * 4096 * 2 + (2 * 32 + 1) * 4096 * 2 + 32 * 8 * 4096 * 4  # embedding, norms, routers
    cut = 32000 * 4096 + 32 * ((2 * 4096 + 2 * 1024) * 4096 + 8 * 3 * 14336 * 4096)
    assert found.weights == shared + 2 * cut // 8
    assert found.cache == 2 * 32 * rows * positions * (8 // 8) * 128 * 2
    assert rows_at_once(rows, 2048) == 1 and found.total > found.exact > 11.5e9


@pytest.mark.parametrize(
    ("changes", "devices", "messages"),
    [
        ({}, 4, ["over all 4 devices by model_parallel", "set data_parallel: 1, model_parallel: 4"]),
        (
            {"parallel_config__data_parallel": 2, "parallel_config__model_parallel": 4},
            8,
            ["here data_parallel=2, model_parallel=4", "set data_parallel: 1, model_parallel: 8"],
        ),
        ({"parallel__parallel_mode": 0}, 8, ["model_parallel=1", "with parallel.parallel_mode: 1"]),
        ({"model__model_config__n_kv_heads": 4}, 8, ["n_kv_heads=4 is not a multiple of model_parallel=8"]),
        ({"model__model_config__type": "Other", "moe_config__expert_num": 1}, 8, ["predictions of our networks alone"]),
        ({"model__model_config__max_decode_length": -4}, 8, ["max_length (max_decode_length)=-4"]),
        ({"predict_batch_size": 0}, 8, ["predict_batch_size=0: give a whole number above 0"]),
        ({"context__max_device_memory": "much"}, 8, ["context.max_device_memory 'much': write a number and a unit"]),
        ({"context__jit_config": "{jit_level: O7}"}, 8, ["write jit_level: one of O0, O1, O2"]),
    ],
)
def test_refused(changes: dict[str, Any], devices: int, messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan_dry_run(words(**changes), "predict.yaml", devices, "all", Path("out"))
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_too_little_memory_names_the_devices_that_are_enough() -> None:
    two = {"parallel_config__model_parallel": 2}
    with pytest.raises(UserError) as caught:
        plan_dry_run(words(**two), "predict.yaml", 2, "0", Path("out"), "32GB")
    assert "each device needs 46." in str(caught.value) and "4 devices with model_parallel 4 are enough" in str(
        caught.value
    )
    with pytest.raises(UserError, match="no number of devices up to 8 is enough"):
        plan_dry_run(words(**two), "predict.yaml", 2, "0", Path("out"), "8GB")
    warned = plan_dry_run(words(**two, context__max_device_memory="40GB"), "predict.yaml", 2, "0", Path("out"))
    assert any("context.max_device_memory is 40GB" in note for note in warned.notes)


def test_the_shapes_of_the_graphs() -> None:
    """As long as a run's could be: the whole of max_decode_length, or prompts that leave room for max_new_tokens."""
    assert plan_dry_run(words(), "predict.yaml", 8, "all", Path("out")).shape == Shape(1, 256, 256)
    many = words(predict_batch_size=6, model__model_config__max_new_tokens=1000)
    assert plan_dry_run(many, "predict.yaml", 8, "all", Path("out")).shape == Shape(6, 3584, 4096)
    assert plan_dry_run(words(model__model_config__max_length=1), "p", 8, "0", Path("out")).shape == Shape(1, 4, 4)
    uncached = words(model__model_config__use_past=False)
    assert plan_dry_run(uncached, "predict.yaml", 8, "all", Path("out")).shape == Shape(1, 256, 256)


def test_the_device_of_a_configuration() -> None:
    """Of Ascend all that the file says; a CPU has no memory pool to limit and one way to compile."""
    assert run_spec_from_yaml(words()).device == DeviceSpec("Ascend", 0, False, True, "59GB", "O0")
    assert run_spec_from_yaml(words(context__max_device_memory="32.5 GiB")).device.max_memory == "34.897GB"
    alone = words(use_parallel=False, context__device_target="CPU", context__mode=1, context__device_id=3)
    assert run_spec_from_yaml(alone).device == DeviceSpec("CPU", 3, pynative=True)


def test_what_has_no_effect_is_said() -> None:
    idle = words(parallel_config__use_seq_parallel=True, parallel__enable_parallel_optimizer=True)
    notes = plan_dry_run(idle, "predict.yaml", 8, "0", Path("out")).notes
    assert [note.partition(" has no effect on prediction")[0] for note in notes if "on prediction" in note] == [
        "use_seq_parallel=True",
        "enable_parallel_optimizer=True",
    ]
    assert not any("leave its parameters whole" in note for note in notes)


def test_the_cache_of_one_process_is_not_divided_by_a_split_that_it_has_not() -> None:
    """The file's model_parallel 8 without use_parallel, and several processes that share a machine."""
    whole = 2 * 32 * 4096 * 8 * 128 * 2
    for spec in (SPEC, network_spec_from_yaml(words(use_parallel=False), 1)):
        assert check_memory(spec, 1, 4096, available=whole) == whole
        with pytest.raises(UserError, match="0.5 GB are free"):
            check_memory(spec, 1, 4096, available=whole - 1)
