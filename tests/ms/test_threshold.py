# SPDX-License-Identifier: Apache-2.0
"""Experts above a threshold in MindSpore beside the masked sum of all of them in float64; no others have slots."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import THRESHOLD_WORDS, MoESpec
from mindformers_ext.ms.layer import build_feed_forward
from mindformers_ext.ms.moe.dropless import EveryExpert, SlicedExperts
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.moe_twin import (
    GATE,
    TOKENS,
    W1,
    W2,
    W3,
    assert_close,
    differentiated,
    expert,
    layer_of,
    layer_runner,
    random_rows,
    random_weights,
    spec_of,
)

EXPERTS, GROUPS = 5, 2
BIAS = "router.dense.bias"
MOE = MoESpec(
    num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS, capacity_factor=-1, gate="threshold", **THRESHOLD_WORDS
)
BIASES = {"some": [0.4, -0.3, -2.0, 1.0, -0.6], "none": [-1e3] * EXPERTS, "all": [1e3] * EXPERTS}


def weights_of(case: str) -> dict[str, np.ndarray]:
    made = random_weights(EXPERTS)
    return {GATE: made[GATE], BIAS: np.array(BIASES[case], np.float32)} | {name: made[name] for name in (W1, W2, W3)}


def in_torch(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def filled(weights: dict[str, np.ndarray]) -> nn.Cell:
    """The layer in evaluation."""
    layer = layer_of(MOE)
    for parameter in layer.get_parameters():
        parameter.set_data(Tensor(weights[parameter.name]))
    return layer.set_train(False)


def masked_sum(x: torch.Tensor, w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, D), and which expert each token passes (T, E)."""
    chosen = x @ w[GATE].T + w[BIAS] >= 0
    return sum(chosen[:, [e]] * expert(x, w[W1][e], w[W2][e], w[W3][e]) for e in range(EXPERTS)), chosen


# compiled once: 3 s
RUNS = [*((case, ms.PYNATIVE_MODE) for case in BIASES), ("some", ms.GRAPH_MODE)]


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_layer_and_gradients_are_those_of_the_masked_sum(case: str, mode: int) -> None:
    ms.set_context(mode=mode)
    x, weights, weight = random_rows(3), weights_of(case), random_rows(4)
    chosen = masked_sum(torch.from_numpy(x), in_torch(weights))[1]
    counts = {*chosen.sum(1).tolist()}
    assert len(counts) > 3 if case == "some" else counts == {0 if case == "none" else EXPERTS}
    found = layer_runner(MOE, weights, GROUPS)(x, weight)
    assert_close(found, differentiated(lambda x, w: masked_sum(x, w)[0], x, weights, weight))
    assert found.load.tolist() == chosen.sum(0).tolist() and found.dropped == 0


@pytest.mark.parametrize("form", [EveryExpert, SlicedExperts])
@pytest.mark.parametrize("case", BIASES)
def test_inference_adds_up_the_same(form: type[nn.Cell], case: str) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x, weights = random_rows(3), weights_of(case)
    layer = filled(weights)
    padding = np.arange(TOKENS) % 5 == 3
    found = form(layer)(Tensor(x), Tensor(1 - padding.astype(np.int32))).asnumpy()
    wanted = masked_sum(torch.from_numpy(x), in_torch(weights))[0]
    np.testing.assert_allclose(found[~padding], wanted.numpy()[~padding], rtol=0, atol=2e-5)


def test_an_expert_has_no_more_slots_than_the_one_with_most_tokens() -> None:
    """And tokens that do not count are in no report."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x, weights = random_rows(3), weights_of("some")
    layer = filled(weights)
    chosen = masked_sum(torch.from_numpy(x), in_torch(weights))[1]
    counted = (np.arange(TOKENS) % 3 > 0).astype(np.float32)
    bias = Tensor(np.zeros(EXPERTS, np.float32))
    dispatch, *_, report, load = layer.places_of_counted(
        layer.router.scores(Tensor(x)).expand_dims(0), bias, Tensor(counted[None])
    )
    most = int(chosen.sum(0).max())
    assert dispatch.shape == (1, EXPERTS, most) and most < TOKENS
    assert load.asnumpy()[0].tolist() == chosen.sum(0).tolist()
    assert report.asnumpy()[0].tolist() == [*chosen.numpy()[counted > 0].sum(0).tolist(), 0.0]


def test_a_network_cut_over_devices_is_refused() -> None:
    spec = spec_of(MOE)
    spec = replace(spec, parallel=replace(spec.parallel, device_num=2, parallel_mode="semi_auto_parallel"))
    with pytest.raises(UserError, match="not cut over devices"):
        build_feed_forward(spec, spec.model.layer(0), select_operators())
