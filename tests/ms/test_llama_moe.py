# SPDX-License-Identifier: Apache-2.0
"""LLaMA-MoE's layer in MindSpore beside its closed forms in float64 (``tests.helpers.llama_moe_oracle``)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.philox import noise_keys
from mindformers_ext.ms.layer import build_feed_forward
from mindformers_ext.ms.ops.noise import MixtureNoise
from mindformers_ext.ms.ops.select import select_operators
from tests.helpers.noise import mixture_noise
from tests.helpers.noisy import CASES, NoisyCase


class Losses(nn.Cell):
    """The routing loss () of a layer, and what else is compared."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x_TD: Tensor, noise_TE: Tensor | None) -> tuple[Tensor, ...]:
        scores_TS = self.layer.scores(x_TD, noise_TE)
        expert_GNK, weight_GNK, _ = self.layer.router.choose(scores_TS.expand_dims(0), self.layer.router.bias())
        y_TD, aux_loss_G, _ = self.layer(x_TD, noise_TE)
        return aux_loss_G.sum(), expert_GNK, weight_GNK, y_TD


# of equal logits MindSpore's TopK takes whichever it likes; one compiled case is enough
RUNS = [(case, ms.PYNATIVE_MODE) for case in CASES if not case.tied] + [(CASES[1], ms.GRAPH_MODE)]


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_layer_equals_its_closed_form(case: NoisyCase, mode: int) -> None:
    ms.set_context(mode=mode)
    spec, told, z = case.spec(), case.told(), case.z()
    layer = build_feed_forward(spec, spec.model.layer(0), select_operators().for_network(spec))
    held = {item.name: item for item in layer.get_parameters()}
    for name, array in case.weights().items():
        held[name].set_data(Tensor(array))
    losses = Losses(layer).set_train()
    parameters = [held[name] for name in told.gradients]
    run = ms.value_and_grad(losses, None, parameters, has_aux=True)
    (loss, expert, weight, y), gradients = run(Tensor(case.x()), None if z is None else Tensor(z))
    np.testing.assert_array_equal(expert.asnumpy()[0], told.index)
    np.testing.assert_allclose(weight.asnumpy()[0], told.weight, rtol=0, atol=1e-6 * case.factor)
    assert float(loss) == pytest.approx(told.loss, abs=1e-6)
    for (name, gradient), found in zip(told.gradients.items(), gradients, strict=True):
        np.testing.assert_allclose(found.asnumpy(), gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(y.asnumpy(), told.output, rtol=0, atol=2e-6 * np.abs(told.output).max())


def test_noise_is_that_of_its_keys() -> None:
    """A row of the middle, a seed above 2^31, experts that do not fill blocks; beside numpy's."""
    keys, shape = noise_keys(0xF0000001, 41, range(3, 5)), (5, 7, 6)
    found = MixtureNoise((2, 4), shape)(Tensor(keys)).asnumpy().reshape(2, 7, 2, 6)
    for number, place in enumerate((2, 4)):
        np.testing.assert_allclose(found[:, :, number], mixture_noise(keys, place, shape), rtol=0, atol=1e-6)
