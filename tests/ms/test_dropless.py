# SPDX-License-Identifier: Apache-2.0
"""Experts for inference equal a ten-line loop in any load, and padding changes nothing, in all four forms."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ext.core.layers import MoESpec
from mindformers_ext.ms.moe.dropless import (
    ChosenExperts,
    EveryExpert,
    SlicedExperts,
    SortedRows,
    dropless,
    shared_parts,
)
from mindformers_ext.ms.moe.layer import MoE
from tests.helpers.moe_twin import GATE, HIDDEN, W1, W2, W3, layer_of, random_rows, random_weights

FORMS = [ChosenExperts, EveryExpert, SlicedExperts, SortedRows]
# A capacity factor that would drop nearly everything: inference does not look at it.
MIXTRAL = MoESpec(num_local_experts=5, num_experts_per_tok=2, capacity_factor=0.2)


def loop(x: np.ndarray, weights: dict[str, np.ndarray], chosen: int, normal: bool = True) -> np.ndarray:
    """The ten lines, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    out = np.zeros(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        odds = np.exp(w[GATE] @ row - (w[GATE] @ row).max())
        odds /= odds.sum()
        best = np.argsort(-odds, kind="stable")[:chosen]
        for e in best:
            up, gate = w[W3][e] @ row, w[W1][e] @ row
            share = odds[e] / odds[best].sum() if normal else odds[e]
            out[t] += share * (w[W2][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def layer(moe: MoESpec, weights: dict[str, np.ndarray]) -> MoE:
    cell = layer_of(moe)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(weights[parameter.name]))
    cell.set_train(False)
    return cell


def run(form: type[nn.Cell], moe: MoESpec, weights: dict, x: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    valid = np.ones(len(x)) if valid is None else valid
    if form is SortedRows:
        moe = replace(moe, use_gmm=True, capacity_factor=0.0)
    cell = form(layer(moe, weights))
    step = 1 if form is ChosenExperts else len(x)  # which takes one token
    parts = [slice(first, first + step) for first in range(0, len(x), step)]
    return np.concatenate([cell(Tensor(x[own]), Tensor(valid[own].astype(np.int32))).asnumpy() for own in parts])


def loads() -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Rows and weights by name: ordinary, all tokens to the same two experts, the last experts never chosen, one."""
    ordinary, one_way, idle = random_weights(5, 4), random_weights(5, 5), random_weights(5, 6)
    positive = np.abs(random_rows(8)) + 0.1
    one_way[GATE][:] = np.array([0.0, -3.0, 2.0, 3.0, -2.0])[:, None]
    idle[GATE][2:] = -9.0
    return {
        "ordinary": (random_rows(1), ordinary),
        "all to two": (positive, one_way),
        "three idle": (positive, idle),
        "one token": (random_rows(2, 1), ordinary),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("load", loads())
def test_equals_the_loop_in_any_load(mode: str, form: type[nn.Cell], load: str) -> None:
    x, weights = loads()[load]
    expected = loop(x, weights, 2)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(run(form, MIXTRAL, weights, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_choice_of_probability_weight(mode: str, form: type[nn.Cell]) -> None:
    moe, weights = MoESpec(num_local_experts=4, num_experts_per_tok=1), random_weights(4, 7)
    x = random_rows(3)
    np.testing.assert_allclose(run(form, moe, weights, x), loop(x, weights, 1, normal=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_neither_routes_nor_takes_room(mode: str, form: type[nn.Cell]) -> None:
    """Rows of other tokens among padding give what they give alone; slots are as many as real tokens need."""
    x, weights = random_rows(1), random_weights(5, 4)
    valid = np.arange(len(x)) % 3 > 0
    filled = np.where(valid[:, None], x, 100.0).astype(np.float32)  # padding that would crowd one expert
    found = run(form, MIXTRAL, weights, filled, valid)
    np.testing.assert_allclose(found[valid], loop(x[valid], weights, 2), rtol=0, atol=1e-5)
    if form is SlicedExperts:
        np.testing.assert_array_equal(found[~valid], 0.0)
        assert not run(form, MIXTRAL, weights, filled, np.zeros(len(x))).any()  # nothing but padding


def test_an_expert_that_was_idle_works_in_the_next_call(mode: str) -> None:
    """MindSpore's CPU kernel for transpositions ends for good with its first empty operand: none may meet one."""
    weights = random_weights(5, 6)
    weights[GATE][2:] = np.array([-9.0, -10.0, -11.0])[:, None]
    cell = SlicedExperts(layer(MIXTRAL, weights))
    for x in (loads()["three idle"][0], random_rows(1), random_rows(2)):
        for valid in (np.arange(len(x)) < 2, np.arange(len(x)) >= 0, np.arange(len(x)) % 2 > 0):
            found = cell(Tensor(x), Tensor(valid.astype(np.int32))).asnumpy()
            np.testing.assert_allclose(found[valid], loop(x[valid], weights, 2), rtol=0, atol=1e-5)


def test_parts_share_the_memory_of_the_whole() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    weight = layer(MIXTRAL, random_weights(5)).ffn.w1.weight
    parts, whole = shared_parts(weight), weight.asnumpy()
    whole[3] = 7.0
    assert (parts[3].asnumpy() == 7.0).all() and not (parts[2].asnumpy() == 7.0).any()


def test_the_cheapest_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    cell = layer(MoESpec(num_local_experts=8, num_experts_per_tok=2), random_weights(8))
    assert [type(dropless(cell, tokens)) for tokens in (1, 2, 32, 33, 4096)] == [
        ChosenExperts,
        EveryExpert,
        EveryExpert,
        SlicedExperts,
        SlicedExperts,
    ]
    grouped = MoESpec(num_local_experts=4, num_experts_per_tok=2, use_gmm=True, capacity_factor=0.0)
    cell = layer(grouped, random_weights(4))
    assert [type(dropless(cell, tokens)) for tokens in (1, 40)] == [EveryExpert, SortedRows]
    few = layer(MoESpec(num_local_experts=4, num_experts_per_tok=2), random_weights(4))
    assert type(dropless(few, 1)) is EveryExpert and few.ffn.w1.weight.shape == (4, 7, HIDDEN)
    monkeypatch.setattr("mindformers_ext.ms.moe.dropless.LAUNCH", 0)  # as of large experts: what is read decides
    cell = layer(MoESpec(num_local_experts=8, num_experts_per_tok=2), random_weights(8))
    assert [type(dropless(cell, tokens)) for tokens in (1, 4, 8)] == [SlicedExperts, SlicedExperts, EveryExpert]
    ms.set_context(mode=ms.PYNATIVE_MODE)  # whose views of parts are copied
    assert type(dropless(cell, 1)) is ChosenExperts
