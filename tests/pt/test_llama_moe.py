# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE's layer beside its closed forms in float64 (``tests.helpers.llama_moe_oracle``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindformers_ext.pt.layer import build_feed_forward
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.names import load
from tests.helpers.noisy import CASES, NoisyCase


def layer_of(case: NoisyCase) -> MoE:
    spec = case.spec()
    layer = torch.nn.Module()
    layer.feed_forward = build_feed_forward(spec, spec.model.layer(0))
    load(layer, {f"feed_forward.{name}": array for name, array in case.weights().items()})
    return layer.feed_forward.train()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_equals_its_closed_form(case: NoisyCase) -> None:
    layer, told = layer_of(case), case.told()
    x, z = torch.from_numpy(case.x()), case.z()
    noise = None if z is None else torch.from_numpy(z)
    routing = layer.route(x, noise)
    np.testing.assert_array_equal(routing.expert_GNK[0], told.index)
    np.testing.assert_allclose(routing.weight_GNK[0].detach(), told.weight, rtol=0, atol=1e-6 * case.factor)
    assert routing.aux_loss_G.item() == pytest.approx(told.loss, abs=1e-6)
    routing.aux_loss_G.sum().backward()
    for name, gradient in told.gradients.items():
        found = layer.get_parameter(name).grad
        found = np.zeros_like(gradient) if found is None else found.numpy()
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        layer(x, noise).y_TD.detach(), told.output, rtol=0, atol=2e-6 * np.abs(told.output).max()
    )
