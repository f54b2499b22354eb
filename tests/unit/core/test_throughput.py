# SPDX-License-Identifier: Apache-2.0
"""The estimate of tokens a second: operations counted by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mindformers_ext.core.cluster.anchors import ANCHORS
from mindformers_ext.core.cluster.memory import StepSettings
from mindformers_ext.core.cluster.throughput import anchor_for, estimated_tokens, model_operations
from mindformers_ext.core.config.lora import LoraSpec
from mindformers_ext.core.config.recompute import RecomputeSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec, NumericsSpec, ParallelSpec
from tests.helpers.counted import MOE


def test_operations_per_token_are_six_per_active_weight_and_causal_attention() -> None:
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # wq, wk and wv, wo
    active = 4 * (attention + 8 * 4 + 2 * 3 * 8 * 16) + 8 * 32  # router, two experts of three matrices, head
    assert active == 4224
    assert model_operations(MOE) == 6 * active + 6 * 4 * 4 * 8 == 26112  # 6 * layers * tokens * width of the heads


def test_neither_split_nor_capacity_nor_batch_changes_the_model() -> None:
    parallel = ParallelSpec(data_parallel=2, model_parallel=2, use_seq_parallel=True, device_num=4)
    moe = replace(MOE.model.routing, capacity_factor=3.0)
    other = replace(MOE, batch_size=3, parallel=parallel, model=replace(MOE.model, moe=moe))
    assert model_operations(other) == model_operations(MOE)


def test_mixtral_8x7b() -> None:
    """12,748,587,008 weights are multiplied for a token of Mixtral-8x7B, embedding and norms left out."""
    moe = replace(MOE.model.routing, num_local_experts=8)
    model = replace(MOE.model, vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    model = replace(model, num_attention_heads=32, num_key_value_heads=8, head_dim=128, moe=moe)
    spec = replace(MOE, model=model, seq_length=4096)
    assert model_operations(spec) == 6 * 12_748_587_008 + 6 * 32 * 4096 * 4096
    alone = estimated_tokens(spec, StepSettings(), 0.0, ANCHORS[0])
    assert alone == pytest.approx(0.317 * 313e12 / 79_712_747_520, rel=1e-12)  # 1244.7
    parallel = ParallelSpec(pipeline_stage=2, micro_batch_num=4, device_num=2)
    again = StepSettings(RecomputeSpec(frozenset(range(32))))
    assert estimated_tokens(replace(spec, parallel=parallel), again, 0.25, ANCHORS[0]) == pytest.approx(
        alone * (4 / 5) / 1.25, rel=1e-12
    )


@pytest.mark.parametrize("name", ["Atlas 900 A2", "atlas-900-a2", "ATLAS_900_A2"])
def test_a_device_by_its_name(name: str) -> None:
    assert anchor_for(MOE, StepSettings(), name) == ANCHORS[0]


@pytest.mark.parametrize(
    "spec, settings, device, message",
    [
        (MOE, StepSettings(), "Atlas 800I A3", "nothing published for --device 'Atlas 800I A3' .* Atlas 900 A2$"),
        (MOE, StepSettings(), "", "--device ''"),
        (replace(MOE, model=replace(MOE.model, moe=None)), StepSettings(), "Atlas 900 A2", "mixture of experts"),
        (
            replace(MOE, numerics=NumericsSpec(compute_dtype="float32")),
            StepSettings(),
            "Atlas 900 A2",
            "compute_dtype is float32: set bfloat16 or float16",
        ),
        (MOE, StepSettings(lora=LoraSpec(targets=".*wq")), "Atlas 900 A2", "pet_config trains adapters"),
    ],
)
def test_what_is_not_estimated(spec: NetworkSpec, settings: StepSettings, device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        anchor_for(spec, settings, device)
