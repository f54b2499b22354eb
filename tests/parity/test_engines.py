# SPDX-License-Identifier: Apache-2.0
"""The PyTorch engine beside the MindSpore engine and transformers: same weights, same tokens.

Limits: routing indices exactly, logits 1e-4, losses 1e-5, gradients 1e-3 relative; `pytest -s` prints what was found.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec
from mindformers_ext.ms.causal_lm import build_causal_lm as build_ms
from mindformers_ext.ms.engine import MindSporeNetwork
from mindformers_ext.ms.step import LossNetwork
from mindformers_ext.pt import names
from mindformers_ext.pt.causal_lm import build_causal_lm
from mindformers_ext.pt.moe.gate import TopkChoice
from mindformers_ext.pt.moe.slots import apply_slots, build_slots
from mindformers_ext.weights.convert import to_hf, to_mindspore
from tests.helpers.parity import Case, Outcome, compare, reference_of
from tests.helpers.router import TopkRouterV2 as MindSporeRouter
from tests.parity.test_llama import FAST as LLAMA
from tests.parity.test_llama import SLOW as LLAMA_LONG
from tests.parity.test_mixtral import FAST as MIXTRAL
from tests.parity.test_mixtral import SLOW as MIXTRAL_LONG

LOSSES = (("expert", 0.05), ("device", 0.03), ("comm", 0.02))
OPTIONS: dict[str, dict] = {
    "softmax": {},
    "not normalised": {"norm_topk_prob": False},
    "sigmoid, scaled": {"use_gating_sigmoid": True, "routed_scaling_factor": 2.5},
    "best groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "two best, sigmoid, bias": {
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "use_gating_sigmoid": True,
        "balance_via_topk_bias": True,
    },
    "bias": {"balance_via_topk_bias": True},
}


def moe_of(options: dict, factor: float, sdrop: bool, experts: int = 8, chosen: int = 2) -> MoESpec:
    return MoESpec(
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        capacity_factor=factor,
        enable_sdrop=sdrop,
        aux_losses=LOSSES,
        expert_group_size=4,
        z_loss_factor=0.01,
        **options,
    )


def run_torch(model: NetworkSpec, weights: dict[str, np.ndarray], ids: np.ndarray, whole: bool = False) -> tuple:
    """Our PyTorch network's outcome and terms; the gradients are those of the LM loss, or of the ``whole`` loss."""
    network = build_causal_lm(model)
    names.load(network, weights)
    tokens = torch.from_numpy(ids.astype(np.int64))
    terms = network(tokens, losses=True)
    (terms.loss if whole else terms.lm_loss).backward()
    gradients: dict[str, np.ndarray] = {}
    for name, parameter in network.named_parameters():
        gradients |= {n: g.numpy() for n, g in names.split_experts(name, parameter.grad).items()}
    with torch.no_grad():
        logits = network(tokens[:, :-1]).numpy()
    numbers = [term.detach().numpy() for term in terms]
    return Outcome(logits, float(numbers[0 if whole else 1]), gradients), numbers


def judge(title: str, found: Outcome, expected: Outcome) -> None:
    difference = compare(found, expected)
    print(
        f"\n{title:<40} logits {difference.logits:.1e}  loss {difference.loss:.1e}  gradient "
        f"{difference.gradient:.1e} ({difference.worst})",
        end="",
    )
    assert difference.logits <= 1e-4 and difference.loss <= 1e-5 and difference.gradient <= 1e-3


@pytest.mark.parametrize("case", [LLAMA[0], *MIXTRAL], ids=lambda case: case.name)
def test_equals_transformers(case: Case) -> None:
    weights, reference = reference_of(case)
    spec = NetworkSpec(model=case.model(), seq_length=case.seq_length, batch_size=case.batch)
    judge(case.name, run_torch(spec, weights, case.ids())[0], reference)


@pytest.mark.slow
@pytest.mark.parametrize("case", [LLAMA[1], LLAMA_LONG[1], *MIXTRAL_LONG[:4]], ids=lambda case: case.name)
def test_equals_transformers_more(case: Case) -> None:
    test_equals_transformers(case)


@pytest.mark.parametrize("style", ["per_expert", "fused", "fused_block_sparse"])
def test_both_spellings_of_hugging_face_are_the_same_weights(style: str) -> None:
    case = MIXTRAL[0]
    weights, _ = reference_of(case)
    again = to_mindspore(to_hf(weights, case.model(), style), case.model())
    network = build_causal_lm(NetworkSpec(model=case.model(), seq_length=4))
    names.fill(network, again.items())
    for name, view in names.named_views(network).items():
        np.testing.assert_array_equal(view.numpy(), weights[name])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("factor", "sdrop"), [(0.7, True), (0.7, False), (-1.0, False)])
def test_routing_equals_mindspore(options: dict, factor: float, sdrop: bool) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe, parallel = moe_of(options, factor, sdrop), ParallelSpec(data_parallel=3, model_parallel=2, expert_parallel=2)
    theirs, ours = MindSporeRouter(moe, parallel), TopkChoice(moe, parallel)
    generator = np.random.default_rng(4)
    if moe.balance_via_topk_bias:
        bias = generator.uniform(0.0, 0.4, 8).astype(np.float32)
        theirs.topk_bias.set_data(Tensor(bias))
        ours.topk_bias.copy_(torch.from_numpy(bias))
    skew = np.linspace(1.0, -1.0, 8)
    for tokens in (1, 5, 64, 257):
        logits = (generator.normal(size=(3, tokens, 8)) * 2 + skew).astype(np.float32)
        _, combine, coeff, _, aux_G, counts_GE, dropped_G = (
            part.asnumpy() for part in theirs.route(Tensor(logits), theirs.bias())
        )
        found = apply_slots(ours(torch.from_numpy(logits)), build_slots(moe, parallel))
        capacity_1 = combine.max() // 8 + 1 if factor < 0 else None
        expert = found.expert_GNK.numpy()
        kept = np.ones_like(expert, bool) if found.kept_GNK is None else found.kept_GNK.numpy()
        np.testing.assert_array_equal(kept, coeff > 0)
        np.testing.assert_array_equal(found.counts_GE.numpy(), counts_GE)
        if capacity_1 is None:
            capacity_1 = _slots(tokens, moe, 2) + 1
            np.testing.assert_array_equal(expert, combine // capacity_1)
        else:
            np.testing.assert_array_equal(expert, theirs.choose(Tensor(logits))[1].asnumpy())
        np.testing.assert_allclose(found.weight_GNK.numpy(), coeff, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.aux_loss_G.numpy(), aux_G, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.dropped_G.numpy(), dropped_G, rtol=0, atol=1e-6)


def _slots(tokens: int, moe: MoESpec, multiple: int) -> int:
    return expert_capacity(moe.num_experts_per_tok, tokens, moe.capacity_factor, moe.num_local_experts, multiple)


BASE = Case(
    "base",
    heads=4,
    kv_heads=2,
    hidden=32,
    head_dim=8,
    ffn=48,
    vocab=101,
    seq_length=12,
    tied=False,
    experts=8,
    chosen=2,
    std=0.25,
)


@functools.cache
def base_weights() -> dict[str, np.ndarray]:
    return reference_of(BASE)[0]


@pytest.mark.parametrize(
    ("options", "factor", "sdrop"),
    [
        ({}, 0.7, True),
        ({}, 0.7, False),
        (OPTIONS["best groups"], 1.1, False),
        (OPTIONS["sigmoid, scaled"], -1.0, True),
        (OPTIONS["two best, sigmoid, bias"], 0.6, True),
        (OPTIONS["not normalised"], 0.6, False),
    ],
)
def test_networks_that_drop_tokens_are_equal(options: dict, factor: float, sdrop: bool) -> None:
    """Two routing groups, every loss on, the gradient of the whole loss."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = replace(BASE.model(), moe=moe_of(options, factor, sdrop), pad_token_id=3)
    spec = NetworkSpec(model=model, seq_length=BASE.seq_length, parallel=ParallelSpec(data_parallel=2))
    theirs = build_ms(spec)
    MindSporeNetwork(theirs).load(base_weights())
    theirs.set_train(True)
    parameters = theirs.trainable_params()
    terms, gradients = ms.value_and_grad(_Whole(theirs), None, parameters, has_aux=True)(Tensor(BASE.ids()))
    expected = Outcome(
        theirs(Tensor(BASE.ids()[:, :-1])).asnumpy(),
        float(terms[0].asnumpy()),
        {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)},
    )
    found, ours = run_torch(spec, base_weights(), BASE.ids(), whole=True)
    assert (float(ours[4].max()) > 0) == (factor > 0)
    judge(f"{options} factor {factor} sdrop {sdrop}", found, expected)
    for mine, other, limit in zip(ours, terms, (1e-5, 1e-5, 1e-5, 0, 1e-6), strict=True):
        np.testing.assert_allclose(mine, other.asnumpy(), rtol=0, atol=limit)


class _Whole(LossNetwork):
    """Differentiates loss, which holds the routing losses."""


def test_padding_and_labels_count_alike() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = replace(BASE.model(), pad_token_id=7)
    spec, ids = NetworkSpec(model=model, seq_length=BASE.seq_length), BASE.ids()
    ids[0, 5:9], labels = 7, ids.copy()
    labels[1, 2:6] = model.ignore_token_id
    theirs = build_ms(spec)
    MindSporeNetwork(theirs).load(base_weights())
    network = build_causal_lm(spec)
    names.load(network, base_weights())
    for given in (None, labels):
        expected = theirs.losses(Tensor(ids), None if given is None else Tensor(given))[1].asnumpy()
        tensor = None if given is None else torch.from_numpy(given).long()
        assert network(torch.from_numpy(ids).long(), tensor, losses=True).lm_loss.item() == pytest.approx(
            float(expected), abs=1e-5
        )
    everything = np.full_like(labels, model.ignore_token_id)
    assert network(torch.from_numpy(ids).long(), torch.from_numpy(everything).long(), losses=True).lm_loss.item() == 0
