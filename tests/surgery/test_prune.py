# SPDX-License-Identifier: Apache-2.0
"""Masks, sizes and multipliers against the specification's numbers; cut weights against the masked model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.config.pruning import MOST_SPARSITY
from mindformers_ext.core.pruning import LOGA_LIMITS, ModelShape, PruningSpec
from mindformers_ext.surgery.prune import hard_concrete as hc
from mindformers_ext.surgery.prune.cut import full_masks, pruned_shape
from mindformers_ext.surgery.prune.lagrangian import expected_weights, lagrangian, overall_sparsity, penalty
from tests.helpers.prune_cases import CASES, GQA, MHA, cut_weights, oracle_masks
from tests.helpers.prune_oracle import logits

IDS = np.arange(9) * 5 % 23
LLAMA = ModelShape(
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    intermediate_size=11008,
    num_hidden_layers=32,
)


@pytest.mark.parametrize(
    ("u", "loga", "bar"), [(0.5, 0, 0.5), (0.1, 1, 0.0708303), (0.9, 1, 1.0901644), (0.05, -1, -0.0967757)]
)
def test_a_sample_is_the_specifications(u: float, loga: float, bar: float) -> None:
    noise = math.log(u) - math.log(1 - u)
    assert hc.stretched(loga, noise) == pytest.approx(bar, abs=1e-6)
    assert hc.sample(loga, noise) == pytest.approx(min(1.0, max(0.0, bar)), abs=1e-6)


def test_scores_soft_values_and_limits() -> None:
    found = hc.score([-2, 0, 1, 2, LOGA_LIMITS[1], LOGA_LIMITS[0]])
    np.testing.assert_allclose(found, [0.4009753, 0.8318222, 0.9307712, 0.9733667, 0.9979823, 0.0471298], atol=5e-8)
    assert MOST_SPARSITY == pytest.approx(0.9528702, abs=5e-8)
    soft = hc.deterministic([LOGA_LIMITS[1], 2, 1, 0, LOGA_LIMITS[0]], keep=5)
    np.testing.assert_allclose(soft, [0.9960347, 0.9168273, 0.7685248, 0.5, 0.0039653], atol=5e-8)
    np.testing.assert_array_equal(hc.clamped(np.float32([5.0, -9.0, 1.0])), np.float32([*LOGA_LIMITS[::-1], 1.0]))


def test_ties_go_from_the_front_and_the_others_stay_soft() -> None:
    mask = hc.deterministic(np.full((2, 5), 4.0), keep=2)
    np.testing.assert_array_equal(mask != 0, [[False, False, False, True, True]] * 2)
    assert 0 < mask[0, 3] < 1
    expected = hc.deterministic([4.6, 4.6, -4.6, -4.6])  # 4 - 2.09 = 1.91 units are to go
    np.testing.assert_array_equal(expected != 0, [True, True, False, False])


def test_sampled_masks_are_open_as_often_as_their_score() -> None:
    (noise,) = hc.noise(3, 7, [(200_000,)])
    assert (hc.sample(0.7, noise) > 0).mean() == pytest.approx(float(hc.score(0.7)), abs=2.5e-3)
    again, other = hc.noise(3, 7, [(200_000,), (4,)])[0], hc.noise(3, 8, [(200_000,)])[0]
    np.testing.assert_array_equal(noise, again)
    assert np.isfinite(noise).all() and not np.any(noise[:10] == other[:10])


def test_the_penalty_squares_inside_the_mean() -> None:
    spec = PruningSpec(source=MHA, modules=("head",), target=replace(MHA, num_attention_heads=1), warmup_steps=640)
    assert spec.targets(320) == (pytest.approx(0.375),)
    gap = [0.40, 0.20]
    assert penalty(gap, 0.1875, 0.3, 0.5) == pytest.approx(0.0450781, abs=1e-7)
    assert penalty(gap, 0.1875, 1.0, 0.0) == pytest.approx(0.1125, abs=1e-7)
    assert penalty(gap, 0.1875, 0.0, 1.0) == pytest.approx(0.0226563, abs=1e-7)


@pytest.mark.parametrize(
    ("sizes", "prunable", "overall"),
    [
        ((4096, 32, 32, 11008), 6476005376, 0.0),
        ((2560, 20, 32, 6912), 2537553920, 0.6081606),
        ((2048, 16, 24, 5504), 1214251008, 0.8125),
        ((1024, 8, 24, 2816), 308281344, 0.9523964),
    ],
)
def test_sizes_of_the_published_models(sizes: tuple[int, ...], prunable: int, overall: float) -> None:
    d, heads, layers, inner = sizes
    target = ModelShape(
        hidden_size=d,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        intermediate_size=inner,
        num_hidden_layers=layers,
    )
    assert target.prunable() == prunable
    assert 1 - target.prunable() / LLAMA.prunable() == pytest.approx(overall, abs=5e-8)
    names = {"hidden": d, "head": heads, "intermediate": inner, "layer": layers}
    scores = {}
    for name, keep in names.items():
        scores[name] = np.zeros(LLAMA.mask_shape(name))
        scores[name][..., :keep] = 1
    assert expected_weights(scores, LLAMA) == prunable


def test_expected_sizes_with_grouped_queries_are_exact_for_hard_masks() -> None:
    llama3 = replace(LLAMA, num_key_value_heads=8, intermediate_size=14336)
    assert llama3.prunable() == 6979321856
    names = {"kv_head": 2, "q_in_group": 2, "hidden": 8, "intermediate": 5, "layer": 2}
    scores = {name: np.zeros(GQA.mask_shape(name)) for name in names}
    for name, keep in names.items():
        scores[name][..., :keep] = 1
    left = replace(
        GQA, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=5, num_hidden_layers=2
    )
    assert expected_weights(scores, GQA) == left.prunable()


def test_all_masks_open_have_the_specifications_sparsity() -> None:
    spec = PruningSpec(source=MHA, modules=("hidden", "head", "intermediate"), target_sparsity=0.5)
    loga = {name: np.full(MHA.mask_shape(name), 5.0) for name in spec.modules}
    found = overall_sparsity({name: hc.clamped(value) for name, value in loga.items()}, spec)
    assert found == pytest.approx(0.0040313, abs=1e-6)  # 1 - s^2
    with_layers = replace(spec, modules=(*spec.modules, "layer"))
    loga = {name: hc.clamped(np.full(MHA.mask_shape(name), 5.0)) for name in with_layers.modules}
    assert overall_sparsity(loga, with_layers) == pytest.approx(0.0060407, abs=1e-6)  # 1 - s^3
    assert lagrangian(loga, {"": (0.3, 0.5)}, with_layers, 0) == pytest.approx(
        0.3 * (0.0060407 - 0.5) + 0.5 * (0.0060407 - 0.5) ** 2, abs=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_pruned_weights_are_the_masked_model(name: str) -> None:
    case = CASES[name]
    masks = case.masks()
    masked = logits(case.weights(), IDS, case.sizes(), oracle_masks(masks))
    pruned = logits(cut_weights(case, masks), IDS, case.sizes())
    assert np.abs(masked - logits(case.weights(), IDS, case.sizes())).max() > 0.1
    np.testing.assert_allclose(pruned, masked, rtol=0, atol=1e-5)


def test_folding_the_head_as_the_reference_did_is_another_model() -> None:
    case = CASES["soft"]
    masked = logits(case.weights(), IDS, case.sizes(), oracle_masks(case.masks()))
    folded = logits(cut_weights(case, case.masks(fold_head=True)), IDS, case.sizes())
    assert np.abs(folded - masked).max() > 0.1


def test_what_has_no_single_shape_is_refused() -> None:
    assert pruned_shape(CASES["groups, both"].masks()) == replace(
        GQA, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    with pytest.raises(ValueError, match="keep one half alone"):
        pruned_shape(CASES["halves"].masks())
    with pytest.raises(ValueError, match=r"intermediate_size is 0, 4 by layer"):
        pruned_shape(CASES["no intermediate in one layer"].masks())
    with pytest.raises(ValueError, match="hidden_size is 0"):
        pruned_shape(full_masks({"hidden": np.zeros(12)}, MHA, False))
    with pytest.raises(ValueError, match="no numbers from 0 to 1"):
        full_masks({"hidden": np.full(12, np.nan)}, MHA, False)
