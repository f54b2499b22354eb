# SPDX-License-Identifier: Apache-2.0
"""How proportions of a data mixture begin and move, beside printed examples; caps and least entropy, as properties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mindformers_ext.data.mixture.bounds import Bounds, entropy
from mindformers_ext.data.mixture.presets import PRESETS
from mindformers_ext.data.mixture.rules import ALIASES, RULES, Settings, start, updated

FEW = [0.5, 0.3, 0.2], [2.0, 1.5, 1.0], [1.8, 1.6, 1.0]
RED = (
    [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15],
    [2.2143, 0.6959, 2.5393, 1.7117, 2.0590, 1.4449, 2.6251],
    PRESETS["sheared_1.3b"].targets or (),
)
SLIM = (
    PRESETS["llama"].proportions,
    [1.728, 2.117, 0.705, 1.572, 2.071, 1.287, 1.491],
    PRESETS["llama"].targets or (),
)
AFTER = [0.6490392378, 0.0323074618, 0.0506600672, 0.0166895380, 0.0458404839, 0.0188747760, 0.1865884352]
# rule, (proportions, losses, targets), what must come out; the last two were printed to eight digits from float32
EXAMPLES = [
    ("doremi", FEW, [0.5643163249, 0.2508520064, 0.1848316688]),
    ("doremi_clipped", FEW, [0.5498123472, 0.2701059250, 0.1800817278]),
    ("doremi", RED, AFTER),
    (
        "doremi_clipped",
        RED,
        [0.6479663121, 0.0339070462, 0.0505763429, 0.0166619716, 0.0457647270, 0.0188435971, 0.1862800030],
    ),
    (
        "sheared_llama",
        SLIM,
        [0.66874797, 0.15060248, 0.04361213, 0.04255906, 0.05012371, 0.02521453, 0.01914013],
    ),
    (
        "sheared_llama_paper",
        SLIM,
        [0.66820388, 0.15046889, 0.04356330, 0.04327887, 0.05006972, 0.02518028, 0.01923506],
    ),
]


def moved(rule: str, values: Sequence[Sequence[float]], **more: object) -> np.ndarray:
    settings = Settings(ALIASES.get(rule, rule), **more)  # type: ignore[arg-type]
    return updated(settings, *(np.array(value, np.float64) for value in values))


@pytest.mark.parametrize(("rule", "values", "expected"), EXAMPLES)
def test_published_updates_come_out_to_their_last_digit(rule: str, values: tuple, expected: list[float]) -> None:
    found = moved(rule, values)
    digits = max(len(repr(value)) - 2 for value in expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5.1e-11 if digits == 10 else 1e-8)
    assert found.sum() == pytest.approx(1, abs=1e-15)


def test_a_second_update_goes_on_from_the_first() -> None:
    second = [0.6188681522, 0.0228351270, 0.0561355040, 0.0137110285, 0.0459638157, 0.0140303262, 0.2284560465]
    first = moved("doremi", RED)
    np.testing.assert_allclose(moved("doremi", (first, *RED[1:])), second, rtol=0, atol=5.1e-11)


def test_a_small_constant_gap_runs_away_and_a_cap_holds_it() -> None:
    """0.1 nat in one domain over 64 evaluations takes .045 to .96504, as users of the reference saw."""
    targets = np.zeros(7)
    losses = targets + 0.1 * (np.arange(7) == 4)
    free = capped = np.array(RED[0])
    bounds = Bounds(high=0.4, low=0.01)
    for _ in range(64):
        free = updated(Settings("doremi"), free, losses, targets)
        capped = updated(Settings("doremi", bounds=bounds), capped, losses, targets)
        assert bounds.hold(capped)
    assert free[4] == pytest.approx(0.96504, abs=5e-6) and capped[4] == pytest.approx(0.4)


def test_a_domain_without_a_loss_counts_as_on_target() -> None:
    proportions, losses, targets = FEW
    absent = moved("doremi", (proportions, [losses[0], np.nan, losses[2]], targets))
    on_target = moved("doremi", (proportions, [losses[0], targets[1], losses[2]], targets))
    assert np.array_equal(absent, on_target)


def test_words_change_what_they_name() -> None:
    alpha = np.array(FEW[0]) * np.exp(2.0 * (np.array(FEW[1]) - FEW[2]))
    expected = 0.9 * alpha / alpha.sum() + 0.1 / 3
    np.testing.assert_allclose(moved("doremi", FEW, eta=2.0, smoothing=0.1), expected, rtol=1e-14)
    for rule in ("constant", "stratified", "temperature"):
        assert moved(rule, FEW).tolist() == FEW[0]


def test_where_proportions_begin() -> None:
    rows, given = np.array([1000.0, 100, 10]), np.array([0.5, 0.3, 0.2])
    assert start(Settings("constant"), rows, given).tolist() == [0.5, 0.3, 0.2]
    assert start(Settings("stratified"), rows, given).tolist() == [1 / 3] * 3
    assert start(Settings("doremi"), rows, None).tolist() == [1 / 3] * 3
    roots = np.sqrt(rows)
    np.testing.assert_allclose(start(Settings("temperature", temperature=2.0), rows, None), roots / roots.sum())
    np.testing.assert_allclose(start(Settings("temperature"), rows, None), rows / rows.sum())
    assert set(ALIASES.values()) <= set(RULES)


def test_presets_are_whole() -> None:
    for preset in PRESETS.values():
        assert sum(preset.proportions) == pytest.approx(1, abs=1e-9)
        assert len(preset.names) == len(preset.proportions) == len(preset.targets or preset.names)


def test_the_projection_meets_caps_and_entropy_and_keeps_ratios() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        count = int(rng.integers(1, 12))
        free = rng.dirichlet(np.full(count, 0.2))
        low, high = rng.uniform(0, 1 / count), rng.uniform(1 / count, 1)
        least = rng.uniform(0, np.log(count)) * int(rng.integers(0, 2))
        bounds = Bounds(low, high, least)
        found = bounds.nearest(free)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert (found >= low - 1e-15).all() and (found <= high + 1e-15).all() and entropy(found) >= least - 1e-9
        again = bounds.nearest(found)
        np.testing.assert_allclose(again, found, atol=1e-9)  # a projection
        order = np.argsort(free)
        assert (np.diff(found[order]) >= -1e-12).all()
        inner = (found > low + 1e-9) & (found < high - 1e-9)
        if not least and inner.sum() > 1:
            ratios = found[inner] / free[inner]
            np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
        if bounds.hold(free):
            assert found is free


def test_no_point_within_the_caps_is_nearer() -> None:
    """By Kullback-Leibler divergence, beside points drawn at random."""
    rng = np.random.default_rng(1)
    bounds, free = Bounds(0.05, 0.4), np.array([0.7, 0.15, 0.1, 0.04, 0.01])
    found = bounds.nearest(free)
    others = [point for point in rng.dirichlet(np.ones(5), 20_000) if bounds.hold(point)]
    distance = [float((point * np.log(point / free)).sum()) for point in (found, *others)]
    assert len(others) > 100 and min(distance[1:]) > distance[0]


def test_bounds_that_nothing_fits_are_known() -> None:
    assert Bounds(0.2, 1.0).allow(5) and not Bounds(0.21, 1.0).allow(5)
    assert Bounds(0.0, 0.2).allow(5) and not Bounds(0.0, 0.19).allow(5)
    assert Bounds(entropy=1.6).allow(5) and not Bounds(entropy=1.7).allow(5)
