# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE's layer beside its closed forms in float64 (``tests.helpers.llama_moe_oracle``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindformers_ext.core.philox import noise_keys
from mindformers_ext.pt.layer import build_feed_forward
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.moe.slots import CapacitySlots
from mindformers_ext.pt.names import load
from mindformers_ext.pt.ops import noise
from tests.helpers import llama_moe_oracle as oracle
from tests.helpers.noise import mixture_noise
from tests.helpers.noisy import CASES, TOKENS, NoisyCase


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
    drawn = None if z is None else torch.from_numpy(z)
    routing = layer.route(x, drawn)
    np.testing.assert_array_equal(routing.expert_GNK[0], told.index)
    np.testing.assert_allclose(routing.weight_GNK[0].detach(), told.weight, rtol=0, atol=1e-6 * case.factor)
    assert routing.aux_loss_G.item() == pytest.approx(told.loss, abs=1e-6)
    routing.aux_loss_G.sum().backward()
    for name, gradient in told.gradients.items():
        found = layer.get_parameter(name).grad
        found = np.zeros_like(gradient) if found is None else found.numpy()
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        layer(x, drawn).y_TD.detach(), told.output, rtol=0, atol=2e-6 * np.abs(told.output).max()
    )


def test_noise_is_that_of_its_keys() -> None:
    """A row of the middle, a seed above 2^31, experts that do not fill blocks; beside numpy's, and normal."""
    keys, shape = noise_keys(0xF0000001, 41, range(3, 6)), (5, 700, 6)
    wanted = mixture_noise(keys, 2, shape)
    found = noise.mixture_noise(torch.from_numpy(keys), 2, shape).numpy().reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mixture_noise(keys[1:2], 2, shape)[0], wanted[1])  # whoever holds the row
    assert abs(wanted.mean()) < 0.03 and abs(wanted.std() - 1) < 0.02
    others = [mixture_noise(noise_keys(1, step, range(3)), place, shape) for step, place in ((0, 0), (1, 0), (0, 1))]
    flat = [values.ravel() for values in (*others, others[0][[1, 2, 0]])]
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.03  # steps, mixtures and rows know nothing of each other


def test_training_without_noise_is_refused_and_evaluation_has_none() -> None:
    case = CASES[0]
    layer, x = layer_of(case), torch.from_numpy(case.x())
    with pytest.raises(ValueError, match="trained with noise"):
        layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x).y_TD, layer.dropless(x))
    torch.testing.assert_close(layer(x, torch.from_numpy(case.z())).y_TD, layer.dropless(x))


def test_capacity_drops_by_the_house_s_rules() -> None:
    """The oracle's output with the same assignments left out, first tokens first."""
    case = CASES[1]
    layer = layer_of(case)
    layer.slots = CapacitySlots(1.0, by_token=True)
    found = layer(torch.from_numpy(case.x()), torch.from_numpy(case.z()))
    told = case.told()
    keep = oracle.kept(told.index, case.experts, TOKENS * case.chosen // case.experts, range(TOKENS))
    assert found.report_GE[0, -1].item() == pytest.approx(1 - keep.mean(), abs=1e-6) and not keep.all()
    np.testing.assert_allclose(found.y_TD.detach(), case.output(keep), rtol=0, atol=2e-6 * np.abs(told.output).max())
