# SPDX-License-Identifier: Apache-2.0
"""The oracle of LLaMA-MoE judged without one: finite differences, draws of noise, identities, hand figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.helpers import llama_moe_oracle as oracle
from tests.helpers.llama_moe_oracle import Gate, GateForm

RNG = np.random.default_rng


def gate_of(width: int, experts: int, layers: int, seed: int = 0, noise: float = 0.5) -> Gate:
    rng = RNG(seed)
    first = rng.standard_normal((experts, width)) / 2
    second = (rng.standard_normal((experts, experts)),) if layers == 2 else ()
    return Gate((first, *second), noise * rng.standard_normal((experts, width)))


def experts_of(width: int, sizes: list[int], seed: int = 1) -> list[oracle.Expert]:
    rng = RNG(seed)
    return [tuple(rng.standard_normal(shape) for shape in ((f, width), (f, width), (width, f))) for f in sizes]


def differences(loss, value: np.ndarray, step: float = 1e-6) -> np.ndarray:
    out = np.zeros_like(value)
    for at in np.ndindex(value.shape):
        kept = value[at]
        value[at] = kept + step
        above = loss()
        value[at] = kept - step
        out[at] = (above - loss()) / (2 * step)
        value[at] = kept
    return out


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_of_balance_are_finite_differences(layers: int, softmax: bool, released: bool) -> None:
    width, experts, tokens = 4, 5, 7
    gate = gate_of(width, experts, layers)
    x, z = RNG(2).standard_normal((tokens, width)), RNG(3).standard_normal((tokens, experts))
    form = GateForm(chosen=2, softmax=softmax, weight=0.3, released=released)
    by_layers, by_noise, by_x = oracle.balance_gradients(x, gate, form, z)
    for value, ours in zip((*gate.layers, gate.noise, x), (*by_layers, by_noise, by_x), strict=True):
        theirs = differences(lambda: oracle.route(x, gate, form, z).balance, value)
        assert np.abs(ours).max() > 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_without_noise_only_importance_has_a_gradient() -> None:
    gate, x = gate_of(4, 5, 2), RNG(2).standard_normal((7, 4))
    form = GateForm(chosen=2, weight=1.0)
    by_layers, by_noise, _ = oracle.balance_gradients(x, gate, form)
    assert not by_noise.any()
    theirs = differences(lambda: oracle.route(x, gate, form).balance, gate.layers[1])
    np.testing.assert_allclose(by_layers[1], theirs, rtol=2e-5, atol=1e-7)


def test_load_counts_chosen_experts_on_average() -> None:
    """Rows sum to k within 2 %, and a share is the chance to be chosen. The released form falls short."""
    tokens, experts, k, draws = 2000, 8, 2, 40
    rng = RNG(4)
    gate, x = gate_of(6, experts, 2, noise=0.0), rng.standard_normal((tokens, 6))
    g, sigma = oracle.gate_logits(x, gate), oracle.noise_sigma(x, gate, 1e-2)
    assert np.allclose(sigma, np.log(2) + 0.01)
    form = GateForm(k)
    sums, shares, chosen, released = [], 0.0, 0.0, []
    for _ in range(draws):
        z = rng.standard_normal((tokens, experts))
        share = oracle.load_shares(g, sigma, z, form)
        sums.append(share.sum(1).mean())
        released.append(oracle.load_shares(g, sigma, z, dataclasses.replace(form, released=True)).sum(1).mean())
        shares = shares + share / draws
        chosen = chosen + oracle.scattered(np.ones((tokens, k)), oracle.choose(g + z * sigma, k), experts) / draws
    assert abs(np.mean(sums) / k - 1) < 0.02
    assert np.abs(shares.mean(0) - chosen.mean(0)).max() < 0.01
    assert np.mean(released) < 0.98 * k


def test_one_redraw_of_one_noise_is_the_share() -> None:
    """The definition: an expert's own noise drawn again, the others' kept."""
    gate, x = gate_of(4, 5, 1), RNG(5).standard_normal((1, 4))
    g, sigma, z = oracle.gate_logits(x, gate), oracle.noise_sigma(x, gate, 1e-2), RNG(6).standard_normal((1, 5))
    share = oracle.load_shares(g, sigma, z, GateForm(2))
    fresh = RNG(7).standard_normal(200_000)
    for e in range(5):
        others = np.sort(np.delete(g + z * sigma, e))[-2]
        assert abs(np.mean(g[0, e] + fresh * sigma[0, e] > others) - share[0, e]) < 0.005


def test_hand_figures() -> None:
    assert oracle.cv2(np.array([3.0])) == 0.0
    assert oracle.cv2(np.array([1.0, 3.0])) == pytest.approx(0.5, rel=1e-9)
    assert oracle.choose(np.array([[1.0, 2.0, 2.0, 1.0]]), 3).tolist() == [[1, 2, 0]]
    assert oracle.capacity(10, 4, 1.25) == 3
    gate = Gate((np.array([[1.0], [2.0], [-1.0]]),), np.zeros((3, 1)))
    plain = oracle.route(np.array([[1.0], [-1.0]]), gate, GateForm(2, softmax=False, weight=1.0))
    assert plain.index.tolist() == [[1, 0], [2, 0]] and plain.scores.tolist() == [[2.0, 1.0], [1.0, -1.0]]
    assert plain.importance.tolist() == [0.0, 2.0, 1.0] and plain.load.tolist() == [2.0, 1.0, 1.0]
    released = oracle.route(np.array([[1.0], [-1.0]]), gate, GateForm(2, softmax=False, released=True))
    assert released.load.tolist() == [1.0, 1.0, 1.0]  # a negative logit is not counted
    masked = oracle.route(np.array([[1.0], [-1.0]]), gate, GateForm(2), real_T=np.array([True, False]))
    assert masked.load.tolist() == [1.0, 1.0, 0.0]


def test_all_experts_are_the_dense_layer() -> None:
    """Neurons in any partition; plain sum, or equal scores and factor E; the residual part counts as well."""
    width, sizes, x = 6, [3, 5, 4], RNG(8).standard_normal((9, 6))
    experts = experts_of(width, sizes)
    whole = [np.concatenate([expert[part] for expert in experts], axis) for part, axis in enumerate((0, 0, 1))]
    dense = oracle.expert_output(x, tuple(whole))
    routing = oracle.route(x, gate_of(width, 3, 2), GateForm(3))
    np.testing.assert_allclose(oracle.routed_output(x, routing, experts, multiply=False), dense)
    equal = oracle.route(x, Gate((np.zeros((3, width)),), np.zeros((3, width))), GateForm(3))
    np.testing.assert_allclose(oracle.routed_output(x, equal, experts, factor=3.0), dense)
    np.testing.assert_allclose(oracle.residual_output(x, np.zeros((3, width)), experts, factor=3.0), dense)
    half = oracle.with_residual(x, dense, dense, RNG(9).standard_normal((2, width)))
    np.testing.assert_allclose(half, dense)
    np.testing.assert_allclose(oracle.with_residual(x, dense, dense), 2 * dense)


def test_a_full_expert_drops() -> None:
    x, experts = RNG(10).standard_normal((4, 3)), experts_of(3, [2, 2])
    routing = oracle.route(x, Gate((np.zeros((2, 3)),), np.zeros((2, 3))), GateForm(1))  # ties: all to expert 0
    limit = oracle.capacity(4, 2, 1.0)
    keep = oracle.kept(routing.index, 2, limit, [3, 2, 1, 0])
    assert keep[:, 0].tolist() == [False, False, True, True] and keep.sum() <= limit * 2
    whole = oracle.routed_output(x, routing, experts)
    zero = oracle.routed_output(x, routing, experts, keep_TK=keep)
    same = oracle.routed_output(x, routing, experts, keep_TK=keep, padding="input")
    assert not zero[:2].any() and np.array_equal(zero[2:], whole[2:])
    assert np.array_equal(same[:2], x[:2]) and np.array_equal(same[2:], whole[2:])
