# SPDX-License-Identifier: Apache-2.0
"""FusedAdamW against torch.optim.AdamW: constant and scheduled rates, groups with and without decay, both modes."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter

from mindformers_ext.core.errors import UserError
from mindformers_ext.ms.optim import FusedAdamW

RATES = [0.1, 0.05, 0.02, 0.01, 0.01]
BETAS, EPS, DECAY = (0.9, 0.95), 1e-3, 0.1  # an eps this large would show a kernel that adds it before the correction


def _groups(parameters: list, grouped: bool) -> list:
    if not grouped:
        return parameters
    return [{"params": parameters[:1], "weight_decay": DECAY}, {"params": parameters[1:], "weight_decay": 0.0}]


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["GRAPH", "PYNATIVE"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_equals_torch(mode: int, grouped: bool, scheduled: bool) -> None:
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (7,))]
    ours = [Parameter(ms.Tensor(value), name=f"p{i}") for i, value in enumerate(start)]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    optimizer = FusedAdamW(_groups(ours, grouped), RATES if scheduled else RATES[0], BETAS, EPS, DECAY)
    oracle = torch.optim.AdamW(_groups(theirs, grouped), RATES[0], BETAS, EPS, DECAY)
    for step, rate in enumerate(RATES):
        gradients = [rng.standard_normal(value.shape).astype(np.float32) for value in start]
        optimizer(tuple(ms.Tensor(gradient) for gradient in gradients))
        for group in oracle.param_groups:
            group["lr"] = rate if scheduled else RATES[0]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        oracle.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert np.abs(mine.asnumpy() - other.detach().numpy()).max() < 1e-6, f"step {step + 1}"


def test_states_carry_mindformers_names() -> None:
    optimizer = FusedAdamW([Parameter(ms.Tensor(np.zeros(3, np.float32)), name="model.norm_out.weight")])
    names = {parameter.name for parameter in optimizer.get_parameters()}
    assert {"adam_m.model.norm_out.weight", "adam_v.model.norm_out.weight", "global_step"} <= names


def test_every_wrong_value_is_listed() -> None:
    half = [Parameter(ms.Tensor(np.zeros(3, np.float16)), name="w")]
    with pytest.raises(UserError) as error:
        FusedAdamW(half, betas=(0.9, 1.0), eps=0.0)
    assert all(word in str(error.value) for word in ("betas", "eps", "param_init_type", "w"))
