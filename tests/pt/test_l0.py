# SPDX-License-Identifier: Apache-2.0
"""The masked network on PyTorch: equal to the oracle for any masks; gradients of masks and multipliers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.pt.l0 import add_masks
from mindformers_ext.surgery.prune import hard_concrete as hc
from mindformers_ext.surgery.prune.lagrangian import lagrangian
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.prune_cases import CASES, GQA, MHA, Case, oracle_masks
from tests.helpers.prune_oracle import logits

IDS = np.arange(9) * 5 % 23


def masked(case: Case, spec: PruningSpec | None = None) -> CausalLM:
    network = build_causal_lm(NetworkSpec(model=case.model(), seq_length=len(IDS)))
    add_masks(network, spec or PruningSpec(source=case.shape, modules=tuple(case.keep)))
    weights = to_mindspore(case.weights(), case.model())
    held = names.named_views(network)
    names.load(network, {name: weights.get(name, held[name].numpy()) for name in held})
    return network


@pytest.mark.parametrize("name", CASES)
def test_the_masked_network_is_the_oracle(name: str) -> None:
    case = CASES[name]
    network = masked(case).eval()
    masks = network.model.l0_module.masks
    for module, value in case.values().items():
        masks[module].values.copy_(torch.from_numpy(value))
    with torch.no_grad():
        found = network(torch.from_numpy(IDS)[None])[0].numpy()
    expected = logits(case.weights(), IDS, case.sizes(), oracle_masks(case.masks()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("target", [True, False])
def test_penalty_sample_and_gradients_are_the_formulas(target: bool) -> None:
    shape = replace(MHA, num_attention_heads=2, num_key_value_heads=2, hidden_size=8) if target else None
    source, modules = (MHA, ("head", "hidden")) if target else (GQA, ("kv_head", "q_in_group", "mlp", "hidden"))
    spec = PruningSpec(source=source, modules=modules, target=shape, target_sparsity=0.4, warmup_steps=10)
    network = masked(Case(source, dict.fromkeys(modules, 1)), spec).train()
    found, rng = network.model.l0_module, np.random.default_rng(0)
    loga = {name: rng.normal(0, 1, source.mask_shape(name)).astype(np.float32) for name in modules}
    noise = dict(zip(modules, hc.noise(1, 2, [v.shape for v in loga.values()]), strict=True))
    lambdas = {pair: (0.3, 0.5) for pair in spec.pairs}
    found.targets.copy_(torch.tensor(spec.targets(4)))
    with torch.no_grad():
        for name in modules:
            found.masks[name].z_loga.copy_(torch.from_numpy(loga[name]))
            found.masks[name].noise.copy_(torch.from_numpy(noise[name]))
        for pair in spec.pairs:
            for name, value in zip(spec.lambda_names(pair), lambdas[pair], strict=True):
                found.lambdas[name].fill_(value)
    found.draw()
    for name in modules:
        np.testing.assert_allclose(found.drawn[name].detach(), hc.sample(loga[name], noise[name]), atol=1e-6)
    penalty = found()
    assert penalty.item() == pytest.approx(lagrangian(loga, lambdas, spec, 4), abs=1e-6)
    penalty.backward()
    name, step = modules[0], 1e-4
    for place in ((0, 0), (1, 1)):
        sides = []
        for sign in (1, -1):
            moved = {key: value.astype(np.float64) for key, value in loga.items()}
            moved[name][place] += sign * step
            sides.append(lagrangian(moved, lambdas, spec, 4))
        expected = (sides[0] - sides[1]) / (2 * step)
        assert found.masks[name].z_loga.grad[place].item() == pytest.approx(expected, rel=1e-3)
    first = found.lambdas[spec.lambda_names(spec.pairs[0])[0]].grad.item()
    up, down = (lagrangian(loga, {**lambdas, spec.pairs[0]: (0.3 + d, 0.5)}, spec, 4) for d in (step, -step))
    assert first == pytest.approx((up - down) / (2 * step), rel=1e-3)


def test_the_norm_over_what_is_left_is_the_specifications() -> None:
    network = masked(Case(replace(MHA, hidden_size=4), {"hidden": 3})).eval()
    network.model.l0_module.masks["hidden"].values.copy_(torch.tensor([0.5, 0.0, 1.0, 0.8]))
    network.model.l0_module.draw()
    norm = network.model.norm_out
    norm.weight.data.fill_(1.0)
    with torch.no_grad():
        found = norm(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0]
    np.testing.assert_allclose(found, [0.1698415, 0, 1.0190487, 1.0869853], atol=1e-6)
