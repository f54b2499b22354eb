# SPDX-License-Identifier: Apache-2.0
"""The masked network on MindSpore: equal to the oracle for any masks; the penalty and its gradients are PyTorch's."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ext.core.pruning import PruningSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.causal_lm import CausalLM, build_causal_lm
from mindformers_ext.ms.engine import fill
from mindformers_ext.ms.l0 import Held, UnitMask, add_masks
from mindformers_ext.ms.lagrangian import Lagrangian
from mindformers_ext.surgery.prune import hard_concrete as hc
from mindformers_ext.surgery.prune.lagrangian import lagrangian
from mindformers_ext.weights.convert import to_mindspore
from tests.helpers.prune_cases import CASES, GQA, MHA, Case, oracle_masks
from tests.helpers.prune_oracle import logits

IDS = np.arange(9) * 5 % 23
# "soft" is compiled, the others run operator by operator; tests/pt/test_l0.py has those that take turns here too.
NOW = ("soft", "groups, both")


def masked(case: Case) -> CausalLM:
    network = build_causal_lm(NetworkSpec(model=case.model(), seq_length=len(IDS)))
    held = add_masks(network, PruningSpec(source=case.shape, modules=tuple(case.keep)))
    fill(network, to_mindspore(case.weights(), case.model()).items(), optional=tuple(held.named()))
    for name, value in case.values().items():
        held.values[name].set_data(Tensor(value))
    assert {p.name for p in network.get_parameters()} >= {*held.named()}
    return network.set_train(False)


@pytest.mark.parametrize(
    "name", [name if name in NOW else pytest.param(name, marks=pytest.mark.turn("masks")) for name in CASES]
)
def test_the_masked_network_is_the_oracle(name: str) -> None:
    case = CASES[name]
    ms.set_context(mode=ms.GRAPH_MODE if name == "soft" else ms.PYNATIVE_MODE)
    found = masked(case)(Tensor(IDS[None].astype(np.int32))).asnumpy()[0]
    expected = logits(case.weights(), IDS, case.sizes(), oracle_masks(case.masks()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("target", [True, False])
def test_penalty_sample_and_gradients_are_the_formulas(target: bool) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    shape = replace(MHA, num_attention_heads=2, num_key_value_heads=2, hidden_size=8) if target else None
    source, modules = (MHA, ("head", "hidden")) if target else (GQA, ("kv_head", "q_in_group", "mlp", "hidden"))
    spec = PruningSpec(source=source, modules=modules, target=shape, target_sparsity=0.4, warmup_steps=10)
    held, rng = Held(spec), np.random.default_rng(0)
    loga = {name: rng.normal(0, 1, source.mask_shape(name)).astype(np.float32) for name in modules}
    noise = dict(zip(modules, hc.noise(1, 2, [v.shape for v in loga.values()]), strict=True))
    held.targets.set_data(Tensor(np.float32(spec.targets(4))))
    for name in modules:
        held.z_loga[name].set_data(Tensor(loga[name]))
        held.noise[name].set_data(Tensor(noise[name]))
    lambdas = {pair: (0.3, 0.5) for pair in spec.pairs}
    for pair in spec.pairs:
        for name, value in zip(spec.lambda_names(pair), lambdas[pair], strict=True):
            held.lambdas[name].set_data(Tensor(np.float32([value])))
    for name in modules:
        mask = UnitMask(held, name).set_train(True)
        np.testing.assert_allclose(mask().asnumpy(), hc.sample(loga[name], noise[name]), atol=1e-6)
    wanted = [held.z_loga[modules[0]], held.lambdas[spec.lambda_names(spec.pairs[0])[0]]]
    value, (by_loga, by_first) = ms.value_and_grad(
        Lagrangian(spec, held.z_loga, held.lambdas, held.targets), None, wanted
    )()
    assert float(value.asnumpy()) == pytest.approx(lagrangian(loga, lambdas, spec, 4), abs=1e-6)
    name, step = modules[0], 1e-4
    sides = []
    for sign in (1, -1):
        moved = {key: array.astype(np.float64) for key, array in loga.items()}
        moved[name][1, 1] += sign * step
        sides.append(lagrangian(moved, lambdas, spec, 4))
    assert by_loga.asnumpy()[1, 1] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3)
    up, down = (lagrangian(loga, {**lambdas, spec.pairs[0]: (0.3 + d, 0.5)}, spec, 4) for d in (step, -step))
    assert by_first.asnumpy()[0] == pytest.approx((up - down) / (2 * step), rel=1e-3)
