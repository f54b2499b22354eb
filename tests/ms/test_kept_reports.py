# SPDX-License-Identifier: Apache-2.0
"""Load that stays on a pipeline's stage: what parameters grow by is what a step reports where it can."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.kept_reports import KEPT
from mindformers_ext.ms.step import LossNetwork, TrainStepCell

pytestmark = pytest.mark.slow  # all together more than 10 seconds

MODEL = ModelSpec(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=-1,
    moe=MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=1.0),
    dense_layers=(1,),
)
SPEC = NetworkSpec(model=MODEL, seq_length=8, batch_size=4, parallel=ParallelSpec(data_parallel=2))


def test_parameters_grow_by_what_the_network_reports() -> None:
    """Under differentiation, over several micro batches, across the end of 32 bits; dense layers keep nothing."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = build_causal_lm(SPEC)
    network.keep_reports()
    network.set_train(True)
    held = {item.name: item for item in network.get_parameters() if item.name.endswith(KEPT)}
    assert list(held) == [f"model.layers.{layer}.{KEPT}" for layer in (0, 2)]
    assert not any(item.requires_grad for item in held.values())
    start = np.full((2, 5), 2**31 - 20, np.int32)
    for item in held.values():
        item.set_data(Tensor(start))
    optimizer = nn.SGD(network.trainable_params(), 0.01)
    step = TrainStepCell(LossNetwork(network), optimizer, micro_batches=2)
    load, dropped = np.zeros((2, 4)), np.zeros(2)
    for number in range(2):
        ids = np.random.default_rng(number).integers(0, 50, (8, 9)).astype(np.int32)
        terms = [term.asnumpy() for term in step(Tensor(ids))[7:]]
        load, dropped = load + terms[0], dropped + terms[1] / 2
    grown = np.stack([(item.asnumpy() - start).sum(0, dtype=np.int32) for item in held.values()])
    np.testing.assert_array_equal(grown[:, :-1], load)
    np.testing.assert_allclose(grown[:, -1] / load.sum(1), dropped, rtol=1e-5)
    assert (grown[:, -1] > 0).all() and max(item.asnumpy().min() for item in held.values()) < 0
