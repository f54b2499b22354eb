# SPDX-License-Identifier: Apache-2.0
"""What must hold of every routing, on drawn logits full of ties; and a twin in plain loops that decides the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mindspore import Tensor

from mindformers_ext.core.capacity import expert_capacity
from mindformers_ext.core.layers import MoESpec
from mindformers_ext.core.spec import ParallelSpec
from mindformers_ext.ms.moe.order import ExpertOrder
from tests.helpers.router import TopkRouterV2
from tests.helpers.routing import Routing, capacity_of, chosen_experts, hard_logits, route, softmax

pytestmark = pytest.mark.slow  # all together more than 30 seconds


@dataclass(frozen=True)
class Drawn:
    """A routing, its words and its (G, N, E) logits."""

    moe: MoESpec
    multiple: int
    logits: np.ndarray
    found: Routing

    @property
    def index(self) -> np.ndarray:
        """Experts (G, N, K) as the router chose them, read back from ``combine``."""
        return self.found.combine // (self.found.capacity + 1)

    @property
    def place(self) -> np.ndarray:
        """Places (G, N, K) from 1 inside the expert, 0 = dropped."""
        return self.found.combine % (self.found.capacity + 1)


@functools.cache
def router_of(moe: MoESpec, multiple: int) -> TopkRouterV2:
    return TopkRouterV2(moe, ParallelSpec(model_parallel=multiple))


def run(moe: MoESpec, logits: np.ndarray, multiple: int = 1) -> Routing:
    """Our router's decision as numpy arrays."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    out = [part.asnumpy() for part in router_of(moe, multiple)(Tensor(logits))]
    return Routing(out[0], out[1], out[2], out[3], out[5], float(out[6]))


@st.composite
def routings(draw: st.DrawFn) -> Drawn:
    """Few distinct logits, so that probabilities tie often and experts overflow."""
    experts = draw(st.sampled_from([1, 2, 4, 5, 12]))
    moe = MoESpec(
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(3, experts))),
        capacity_factor=draw(st.sampled_from([-1.0, 0.3, 0.5, 1.0, 1.1, 2.0])),
        enable_sdrop=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
    )
    shape = (draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([1, 2, 7, 16])), experts)
    logits = draw(arrays(np.int8, shape, elements=st.integers(-3, 3))).astype(np.float32)
    multiple = draw(st.sampled_from([1, 4]))
    return Drawn(moe, multiple, logits, run(moe, logits, multiple))


def every(test):
    """Forty draws of some 60 ms, the same each time; no deadline, the first use of a kernel takes longer."""
    return settings(max_examples=40, deadline=None, derandomize=True)(given(routings())(test))


@every
def test_no_slot_is_used_twice_and_both_tables_agree(drawn: Drawn) -> None:
    found, K = drawn.found, drawn.moe.num_experts_per_tok
    kept = np.argwhere(drawn.place > 0)
    slots = {(g, drawn.index[g, n, j], drawn.place[g, n, j] - 1) for g, n, j in kept}
    assert len(slots) == len(kept)
    assert slots == {tuple(slot) for slot in np.argwhere(found.dispatch > 0)}
    for g, n, j in kept:
        slot = g, drawn.index[g, n, j], drawn.place[g, n, j] - 1
        assert (found.dispatch[slot], found.assignment[slot]) == (n + 1, n * K + j)


@every
def test_kept_counts_are_the_loads_cut_at_capacity(drawn: Drawn) -> None:
    """No expert has a free slot while one of its assignments was dropped, and the dropped share is exact."""
    found, (G, N, E) = drawn.found, drawn.logits.shape
    load = np.stack([np.bincount(drawn.index[g].ravel(), minlength=E) for g in range(G)])
    assert found.capacity == capacity_of(drawn.moe, N, int(load.max()), drawn.multiple)
    np.testing.assert_array_equal((found.dispatch > 0).sum(-1), np.minimum(load, found.capacity))
    np.testing.assert_array_equal(found.load, load.sum(0))
    assignments = G * N * drawn.moe.num_experts_per_tok
    kept = np.minimum(load, found.capacity).sum()
    assert found.dropped == pytest.approx(1 - kept / assignments, abs=1e-7)
    if drawn.moe.capacity_factor <= 0:
        assert found.dropped == 0 and (drawn.place > 0).all()


@pytest.mark.slow
@every
def test_slots_fill_in_drop_order(drawn: Drawn) -> None:
    """sdrop: by place in the sequence; kdrop: every first choice before any second. So the last ones are dropped."""
    K, N = drawn.moe.num_experts_per_tok, drawn.logits.shape[1]
    for by_expert, assignment in zip(drawn.found.dispatch, drawn.found.assignment, strict=True):
        for tokens, ids in zip(by_expert, assignment, strict=True):
            used = int((tokens > 0).sum())
            assert (tokens[:used] > 0).all()  # no hole
            asks = ids[:used] if drawn.moe.enable_sdrop else ids[:used] % K * N + ids[:used] // K
            assert (np.diff(asks) > 0).all()
    if not drawn.moe.enable_sdrop:
        first, later = drawn.place[:, :, 0], drawn.place[:, :, 1:]
        for g, n, j in np.argwhere(later > 0):
            rivals = (drawn.index[g, :, 0] == drawn.index[g, n, j + 1]) & (first[g] == 0)
            assert not rivals.any()  # a second choice was kept: no first choice of that expert was dropped


@pytest.mark.slow
@every
def test_coefficients(drawn: Drawn) -> None:
    """The probability of the chosen expert, normalised over the choices before dropping; 0 where dropped."""
    gate = np.take_along_axis(softmax(drawn.logits), drawn.index, -1)
    if drawn.moe.norm_topk_prob and drawn.moe.num_experts_per_tok > 1:
        gate = gate / gate.sum(-1, keepdims=True)
    np.testing.assert_allclose(drawn.found.coeff, gate * (drawn.place > 0), rtol=1e-5, atol=1e-7)


@every
def test_the_chosen_are_the_best(drawn: Drawn) -> None:
    """Different experts, best first, none better left out. Which of equal ones is the device's affair."""
    values = np.take_along_axis(drawn.logits, drawn.index, -1)
    np.testing.assert_array_equal(values, -np.sort(-drawn.logits, axis=-1)[:, :, : values.shape[2]])
    assert all(len(set(row)) == len(row) for row in drawn.index.reshape(-1, values.shape[2]).tolist())


@every
def test_twin_in_plain_loops(drawn: Drawn) -> None:
    assert_equal(drawn.found, route(softmax(drawn.logits), drawn.moe, drawn.multiple, drawn.index))


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize("factor", [-1.0, 0.5, 1.1])
def test_twin_chooses_too(factor: float, chosen: int) -> None:
    """No ties: the twin is given nothing but probabilities."""
    moe = MoESpec(num_local_experts=6, num_experts_per_tok=chosen, capacity_factor=factor, enable_sdrop=chosen == 2)
    logits = np.random.default_rng(chosen).normal(size=(2, 25, 6)).astype(np.float32)
    assert_equal(run(moe, logits), route(softmax(logits), moe))


def assert_equal(found: Routing, expected: Routing) -> None:
    for name in ("dispatch", "combine", "assignment", "load"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.coeff, expected.coeff, rtol=1e-5, atol=1e-7)
    assert found.dropped == pytest.approx(expected.dropped, abs=1e-7)


@pytest.mark.parametrize("sdrop", [False, True])
@pytest.mark.parametrize("method", ["group_limited_greedy", "noaux_tc"])
def test_twin_with_groups_of_experts_and_a_bias(method: str, sdrop: bool) -> None:
    """The bias is negative somewhere: an expert outside the best groups is not chosen even then."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe = MoESpec(
        num_local_experts=8,
        num_experts_per_tok=3,
        capacity_factor=1.0,
        enable_sdrop=sdrop,
        n_group=4,
        topk_group=2,
        topk_method=method,
        use_gating_sigmoid=True,
        balance_via_topk_bias=True,
    )
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(2, 20, 8)).astype(np.float32)
    bias = generator.uniform(-1.5, 0.2, 8).astype(np.float32)
    router = TopkRouterV2(moe)
    router.topk_bias.set_data(Tensor(bias))
    out = [part.asnumpy() for part in router(Tensor(logits))]
    probability = (1 / (1 + np.exp(-logits))).astype(np.float32)
    chosen = chosen_experts(probability, moe, bias)
    assert_equal(Routing(out[0], out[1], out[2], out[3], out[5], float(out[6])), route(probability, moe, 1, chosen))
    free = chosen_experts(probability, replace(moe, topk_method="greedy"), bias)
    assert (chosen != free).any()  # the limit mattered


@pytest.mark.parametrize("sdrop", [False, True])
def test_groups_do_not_see_each_other(sdrop: bool) -> None:
    moe = MoESpec(num_local_experts=5, num_experts_per_tok=2, capacity_factor=0.7, enable_sdrop=sdrop)
    logits = hard_logits(12, 5, seed=4)
    together = run(moe, logits)
    alone = [run(moe, logits[g : g + 1]) for g in range(len(logits))]
    for name in ("dispatch", "combine", "coeff", "assignment"):
        expected = np.concatenate([getattr(each, name) for each in alone])
        np.testing.assert_array_equal(getattr(together, name), expected, err_msg=name)
    np.testing.assert_array_equal(together.load, sum(each.load for each in alone))
    assert together.dropped == pytest.approx(np.mean([each.dropped for each in alone]), abs=1e-6)


@pytest.mark.parametrize("sdrop", [False, True])
def test_one_graph_serves_other_loads(sdrop: bool) -> None:
    """Dropless in a graph: the capacity follows each call's load."""
    ms.set_context(mode=ms.GRAPH_MODE)
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, capacity_factor=0.0, enable_sdrop=sdrop)
    router, capacities = TopkRouterV2(moe), set()
    for logits in hard_logits(9, 4):
        out = [part.asnumpy() for part in router(Tensor(logits[None]))]
        found = Routing(out[0], out[1], out[2], out[3], out[5], float(out[6]))
        assert_equal(found, route(softmax(logits[None]), moe, 1, found.combine // (found.capacity + 1)))
        capacities.add(found.capacity)
    assert len(capacities) > 2


@pytest.mark.parametrize(
    ("factor", "experts", "chosen", "multiple", "capacity"),
    [(1.1, 8, 2, 1, 1127), (1.1, 8, 2, 4, 1128), (2.0, 8, 2, 1, 2048), (8.0, 8, 2, 1, 4096)],
)
def test_capacity_of_the_published_configuration(
    factor: float, experts: int, chosen: int, multiple: int, capacity: int
) -> None:
    """4096 tokens per group, as MindFormers' Mixtral configurations have them."""
    moe = MoESpec(num_local_experts=experts, num_experts_per_tok=chosen, capacity_factor=factor)
    logits = np.random.default_rng(0).normal(size=(1, 4096, experts)).astype(np.float32)
    assert run(moe, logits, multiple).capacity == capacity == expert_capacity(chosen, 4096, factor, experts, multiple)


@pytest.mark.parametrize("experts", [64, 7000])
def test_positions_are_exact_where_float32_is_not(experts: int) -> None:
    """300 000 assignments: sort keys reach 2**24 with 64 experts and the end of int32 with 7000."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    expert = np.random.default_rng(0).integers(0, experts, (1, 300_000)).astype(np.int32)
    expert[0, -1000:] = experts - 1  # the largest keys of all, next to each other
    assert 2**24 < experts * expert.size < 2**31
    order, position, counts, starts = (part.asnumpy()[0] for part in ExpertOrder(experts)(Tensor(expert)))
    expected = np.argsort(expert[0], kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(counts, np.bincount(expert[0], minlength=experts))
    np.testing.assert_array_equal(starts, np.cumsum(counts) - counts)
    ranks = np.empty_like(expected)
    ranks[expected] = np.arange(len(expected))
    np.testing.assert_array_equal(position, ranks - starts[expert[0]])


def test_a_whole_router_on_300_000_assignments() -> None:
    """Kept, dropped and their order at a size where a float32 count of slots would be the reference's limit."""
    moe = MoESpec(
        num_local_experts=64, num_experts_per_tok=3, capacity_factor=1.0, enable_sdrop=True, max_router_load=300_000
    )
    logits = np.random.default_rng(1).normal(size=(1, 100_000, 64)).astype(np.float32)
    found = run(moe, logits)
    place, load = found.combine % (found.capacity + 1), found.load.astype(np.int64)
    assert found.capacity == 4688 and load.sum() == 300_000
    assert (place > 0).sum() == np.minimum(load, found.capacity).sum() == (found.dispatch > 0).sum()
    index = found.combine[0].ravel() // (found.capacity + 1)
    for expert in (0, 31, 63):
        mine = np.flatnonzero(index == expert)
        np.testing.assert_array_equal(found.assignment[0, expert, : len(mine)], mine[: found.capacity])


def test_more_assignments_than_allowed_are_refused(mode: str) -> None:
    moe = MoESpec(num_local_experts=4, num_experts_per_tok=2, max_router_load=39)
    with pytest.raises(ValueError, match="40 assignments per routing group exceed max_router_load=39"):
        TopkRouterV2(moe)(Tensor(np.zeros((1, 20, 4), np.float32)))
    TopkRouterV2(replace(moe, max_router_load=40))(Tensor(np.zeros((1, 20, 4), np.float32)))


def test_keys_beyond_32_bits_are_refused() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    moe = MoESpec(num_local_experts=2**15, num_experts_per_tok=2**15, max_router_load=2**40)
    with pytest.raises(ValueError, match="do not fit 32-bit keys: use more groups"):
        TopkRouterV2(moe)(Tensor(np.zeros((1, 2, 2**15), np.float32)))
