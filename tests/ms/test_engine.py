# SPDX-License-Identifier: Apache-2.0
"""The door from jobs to MindSpore: weights by name in, logits out, and what does not fit is listed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.jobs.engine.door import open_engine
from mindformers_ext.jobs.engine.protocols import Network
from mindformers_ext.weights.convert import rule_set

MODEL = ModelSpec(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    moe=MoESpec(num_local_experts=3, num_experts_per_tok=2, capacity_factor=0.0),
)


def weights(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {name: shape for binding in rule_set(MODEL).bindings for name, shape in binding.ms.items()}
    return {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def network(model: ModelSpec = MODEL) -> Network:
    return open_engine("ms").build(NetworkSpec(model=model, seq_length=7))


@pytest.mark.slow
def test_logits_follow_the_loaded_weights_and_nothing_else() -> None:
    ids = np.arange(14).reshape(2, 7)
    first, second = network(), network()  # two random starts
    for each in (first, second):
        each.load(weights(1))
    expected = first.logits(ids)
    assert expected.shape == (2, 7, 61) and expected.dtype == np.float32
    np.testing.assert_array_equal(second.logits(ids), expected)
    second.load(weights(2))
    assert np.abs(second.logits(ids) - expected).max() > 0.1  # the compiled graph sees new weights


def test_router_state_need_not_be_in_the_file() -> None:
    assert MODEL.moe
    balanced = replace(MODEL, moe=replace(MODEL.moe, balance_via_topk_bias=True, topk_bias_update_rate=0.01))
    network(balanced).load(weights(1))


def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    given = weights(1)
    del given["lm_head.weight"]
    given["model.layers.2.attention.wq.weight"] = np.zeros((16, 16), np.float32)
    given["model.norm_out.weight"] = np.zeros(15, np.float32)
    each = network()
    each.load(weights(3))
    before = each.logits(np.zeros((1, 7)))
    with pytest.raises(UserError) as caught:
        each.load(given)
    message = str(caught.value)
    assert "1 tensors are missing: 'lm_head.weight'" in message
    assert "1 tensors are unwanted: 'model.layers.2.attention.wq.weight'" in message
    assert "1 tensors are misshaped: 'model.norm_out.weight' (15,) instead of (16,)" in message
    np.testing.assert_array_equal(each.logits(np.zeros((1, 7))), before)


def test_an_engine_nobody_knows() -> None:
    with pytest.raises(UserError, match="no engine called 'tf': choose one of ms"):
        open_engine("tf")
