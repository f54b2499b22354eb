# SPDX-License-Identifier: Apache-2.0
"""Our router equals MindFormers' own ``TopkRouterV2``, run on the CPU in the same test, on friendly and hostile logits.

Each of the six routing groups of a call holds other logits, so one call tries them all. The oracle keeps one multiple
too many slots when dropless; ``reference_capacity`` makes ours do the same here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ParallelSpec
from tests.helpers.router import TopkRouterV2
from tests.helpers.routing import CHOICES, HARD, hard_logits

transformer = pytest.importorskip("mindformers.modules.transformer")  # not in the environment of setup_env.sh --next
LOSSES = (("expert", 0.05), ("device", 0.03), ("comm", 0.02))
FACTORS = (0.5, 1.0, 1.1, 2.0, -1.0)
GROUPS = len(HARD)


def oracle(moe: MoESpec, parallel: ParallelSpec) -> nn.Cell:
    """MindFormers' router of the same words."""
    config = transformer.moe.MoEConfig(
        expert_num=moe.num_local_experts,
        num_experts_chosen=moe.num_experts_per_tok,
        routing_policy="TopkRouterV2",
        capacity_factor=moe.capacity_factor,
        enable_sdrop=moe.enable_sdrop,
        norm_topk_prob=moe.norm_topk_prob,
        use_gating_sigmoid=moe.use_gating_sigmoid,
        routed_scaling_factor=moe.routed_scaling_factor,
        topk_method=moe.topk_method,
        n_group=moe.n_group,
        topk_group=moe.topk_group,
        expert_group_size=moe.expert_group_size,
        balance_via_topk_bias=moe.balance_via_topk_bias,
        aux_loss_types=[kind for kind, _ in moe.aux_losses],
        aux_loss_factors=[value for _, value in moe.aux_losses],
        z_loss_factor=moe.z_loss_factor,
        max_router_load=64,
        comp_comm_parallel=moe.comp_comm_parallel_degree > 1,
        comp_comm_parallel_degree=moe.comp_comm_parallel_degree,
    )
    words = transformer.TransformerOpParallelConfig(
        data_parallel=parallel.data_parallel,
        model_parallel=parallel.model_parallel,
        expert_parallel=parallel.expert_parallel,
    )
    return transformer.moe.TopkRouterV2(8, config, parallel_config=words)


def both(moe: MoESpec, mp: int = 1, ep: int = 1, groups: int = GROUPS) -> tuple[nn.Cell, nn.Cell]:
    """Ours and the oracle."""
    parallel = ParallelSpec(data_parallel=groups, model_parallel=mp, expert_parallel=ep)
    return TopkRouterV2(moe, parallel, reference_capacity=True), oracle(moe, parallel)


def assert_same(ours: nn.Cell, theirs: nn.Cell, logits: np.ndarray) -> None:
    """Indices equal, coefficients to rounding, auxiliary losses to 1e-6."""
    dispatch, combine, coeff, _, aux, _, _ = (part.asnumpy() for part in ours(Tensor(logits)))
    expected_dispatch, expected_combine, expected_coeff, expected_aux = (
        part.asnumpy() for part in theirs(Tensor(logits))
    )
    spare = dispatch.shape[2] - expected_dispatch.shape[2]
    if spare:  # the oracle cuts its slots out of a list of kN: where it wants more, the missing ones are empty
        assert expected_dispatch.shape[2] == combine.shape[1] * combine.shape[2]
        expected_dispatch = np.pad(expected_dispatch, ((0, 0), (0, 0), (0, spare)))
    for g in range(len(logits)):
        np.testing.assert_array_equal(dispatch[g], expected_dispatch[g], err_msg=HARD[g % GROUPS])
        np.testing.assert_array_equal(combine[g], expected_combine[g], err_msg=HARD[g % GROUPS])
    np.testing.assert_allclose(coeff, expected_coeff, rtol=0, atol=1e-7)
    np.testing.assert_allclose(aux, expected_aux, rtol=0, atol=1e-6)


def spec_of(experts: int, chosen: int, factor: float, sdrop: bool, **more: object) -> tuple[MoESpec, int]:
    """Routing with all losses on, and a suitable expert parallel size."""
    parts = next((n for n in (3, 2) if experts % n == 0), 1)
    moe = MoESpec(
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        capacity_factor=factor,
        enable_sdrop=sdrop,
        aux_losses=LOSSES,
        expert_group_size=parts,
        z_loss_factor=0.01,
    )
    return replace(moe, **more), parts if parts == 2 else 1


# Every (order, factor, mp) once, with k and E going round; all their combinations are in the slow test.
_sizes = itertools.cycle([(4, 2), (7, 3), (16, 1), (6, 2), (5, 1), (16, 3), (12, 2)])
PAIRS = [(*next(_sizes), *rest) for rest in itertools.product(FACTORS, (False, True), (1, 4))]
ALL = list(itertools.product((4, 16), (1, 2, 3), FACTORS, (False, True), (1, 4)))


@pytest.mark.parametrize(("experts", "chosen", "factor", "sdrop", "mp"), PAIRS)
def test_router(experts: int, chosen: int, factor: float, sdrop: bool, mp: int) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe, ep = spec_of(experts, chosen, factor, sdrop)
    assert_same(*both(moe, mp, ep), hard_logits(10, experts, seed=experts))


@pytest.mark.long("tests/parity/test_router_oracle.py::test_router takes each pair of values")
@pytest.mark.slow
def test_router_all_combinations() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for experts, chosen, factor, sdrop, mp in ALL:
        moe, ep = spec_of(experts, chosen, factor, sdrop)
        assert_same(*both(moe, mp, ep), hard_logits(12, experts, seed=chosen))


@pytest.mark.parametrize(("factor", "sdrop"), [(1.1, True), (-1.0, False)])
def test_router_in_a_graph(factor: float, sdrop: bool) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    moe, ep = spec_of(6, 2, factor, sdrop)
    ours, theirs = both(moe, 4, ep)
    for seed in range(4):  # dropless: other loads, the same graph
        assert_same(ours, theirs, hard_logits(10, 6, seed=seed))


def test_overlapped_communication_rounds_the_capacity_too() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe, ep = spec_of(4, 2, 1.1, True, comp_comm_parallel_degree=3)
    assert_same(*both(moe, 4, ep), hard_logits(30, 4))


@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("chosen", [1, 3])
def test_choice(words: dict[str, object], chosen: int) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe, ep = spec_of(8, chosen, 1.1, chosen == 3, n_group=4, topk_group=2, **words)
    ours, theirs = both(moe, 1, ep)
    if moe.balance_via_topk_bias:
        bias = Tensor(np.random.default_rng(1).uniform(0.0, 0.6, 8).astype(np.float32))
        ours.topk_bias.set_data(bias)
        theirs.topk_bias.set_data(bias)
    for seed in range(2):
        assert_same(ours, theirs, hard_logits(10, 8, seed=seed))


class GateLoss(nn.Cell):
    """A loss of gate weights (E, D): weighted coefficients plus the auxiliary losses of their logits."""

    def __init__(self, router: nn.Cell, aux_place: int, weight: np.ndarray) -> None:
        super().__init__()
        self.router, self.aux_place = router, aux_place
        self.weight = Tensor(weight)
        self.product = P.MatMul(transpose_b=True)

    def construct(self, x_GND: Tensor, gate_ED: Tensor) -> Tensor:
        G, N, D = x_GND.shape
        logits = self.product(x_GND.reshape((-1, D)), gate_ED).reshape((G, N, -1))
        out = self.router(logits)
        return (out[2] * self.weight).sum() + out[self.aux_place]


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.1, {}),
        (-1.0, {"norm_topk_prob": False}),
        (0.5, {"use_gating_sigmoid": True, "topk_method": "noaux_tc", "balance_via_topk_bias": True}),
    ],
)
def test_gradient_of_the_gate(factor: float, words: dict[str, object]) -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe, ep = spec_of(8, 2, factor, True, n_group=4, topk_group=2, **words)
    generator = np.random.default_rng(5)
    x, gate, weight = (generator.normal(size=shape).astype(np.float32) for shape in ((2, 10, 6), (8, 6), (2, 10, 2)))
    ours, theirs = both(moe, 1, ep, groups=2)
    found = ms.grad(GateLoss(ours, 4, weight), grad_position=1)(Tensor(x), Tensor(gate)).asnumpy()
    expected = ms.grad(GateLoss(theirs, 3, weight), grad_position=1)(Tensor(x), Tensor(gate)).asnumpy()
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max() + 1e-6)


# Values of MindFormers 1.9.0, noted down: E 4, k 2, N 6, capacity factor 0.5, standard normal logits of seed 0.
NOTED = {
    True: ([[1, 0], [4, 6], [1, 2], [2, 3]], [[7, 1], [8, 10], [11, 6], [4, 9], [9, 6], [5, 9]]),
    False: ([[1, 0], [4, 6], [1, 2], [3, 5]], [[7, 1], [8, 9], [10, 6], [4, 9], [11, 6], [5, 9]]),
}


@pytest.mark.parametrize("sdrop", NOTED)
def test_noted_values(sdrop: bool, mode: str) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=0.5, enable_sdrop=sdrop)
    dispatch, combine, *_ = TopkRouterV2(moe)(Tensor(logits))
    assert (dispatch.asnumpy()[0].tolist(), combine.asnumpy()[0].tolist()) == NOTED[sdrop]


def test_the_auxiliary_losses_are_their_factors_when_balanced() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    logits = np.zeros((2, 8, 4), np.float32)
    for n in range(8):
        logits[:, n, n % 4] = 20.0  # every expert is chosen by two tokens, with probability 1
    for kind, factor in LOSSES:
        moe = MoESpec(num_local_experts=4, num_experts_per_tok=1, aux_losses=((kind, factor),), expert_group_size=2)
        aux = TopkRouterV2(moe, ParallelSpec(data_parallel=2, expert_parallel=2))(Tensor(logits))[4]
        np.testing.assert_allclose(aux.asnumpy(), factor, rtol=1e-6)
