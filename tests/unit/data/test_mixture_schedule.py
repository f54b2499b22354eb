# SPDX-License-Identifier: Apache-2.0
"""Which row every sample of a data mixture is: printed draws, slices, passes, exhaustion, and the state in between."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.mixture.permutation import Permutation
from mindformers_ext.data.mixture.schedule import CHUNK, DomainSchedule, domains_of, uniforms
from mindformers_ext.data.mixture.state import LARGEST, Domain, MixtureState, check_continues, state_from_json

START = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
ROWS = (1000, 50, 50, 20, 50, 30, 200)


def state(rows: tuple[int, ...] = ROWS, batch: int = 16, interval: int = 50, seed: int = 17) -> MixtureState:
    domains = tuple(Domain(f"d{number}", count, f"print{number}") for number, count in enumerate(rows))
    shares = START[: len(rows) - 1] + (1 - sum(START[: len(rows) - 1]),)
    return MixtureState(seed, batch, interval, domains, shares, (0,) * len(rows))


def drawn(schedule: DomainSchedule, steps: int) -> list[tuple[int, int]]:
    """(domain, row) of all samples of the next steps."""
    return [pair for _ in range(steps) for pair in zip(*schedule.draw(), strict=True)]


def ordered(rows: int, key: tuple[int, int]) -> list[int]:
    """All rows in their order."""
    return Permutation(rows, key).at(np.arange(rows)).tolist()


def test_the_printed_draws() -> None:
    assert domains_of(uniforms(17, 0, 16), np.array(START)).tolist() == [0] * 9 + [6, 6, 0, 5, 0, 0, 0]
    assert domains_of(uniforms(17, 1, 16), np.array(START)).tolist() == [0, 0, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 6, 3, 0, 5]


def test_shares_are_the_proportions_within_three_sigma() -> None:
    draws = [domains_of(uniforms(17, step, 32), np.array(START)) for step in range(3200)]
    shares = np.bincount(np.concatenate(draws), minlength=7) / 102_400
    assert (np.abs(shares - START) < 3 * np.sqrt(np.array(START) * (1 - np.array(START)) / 102_400)).all()


def test_rounding_gives_no_row_to_a_domain_without_a_share() -> None:
    shares = np.array([0.1] * 9 + [0.1 - 1e-12, 0.0])
    assert domains_of(np.array([1 - 2**-53]), shares).tolist() == [9]


def test_an_order_holds_every_row_once_and_nothing_of_the_corpus_size() -> None:
    for rows in (*range(1, 60), 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 7):
        assert sorted(ordered(rows, (17, rows))) == list(range(rows))
    huge = Permutation(10**12, (17, 1))
    found = huge.at(np.arange(10_000))
    assert len(set(found.tolist())) == 10_000 and 0 <= found.min() and found.max() < 10**12
    assert abs(found.mean() / 10**12 - 0.5) < 0.02  # spread over all rows
    assert np.array_equal(huge.at(np.array([700, 3])), found[[700, 3]])
    keys = ((17, 2), (18, 2), (17, 3), (17, 1 << 63), (17, 1 << 63 | 1), (17, 1 << 63 | 1 << 48))
    assert len({tuple(ordered(1000, key)) for key in keys}) == len(keys)


def test_small_orders_are_all_about_as_frequent() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(ordered(4, (seed, 0)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and min(counts.values()) > 130 and max(counts.values()) < 270  # 200 each, five sigma


@pytest.mark.parametrize("processes", [2, 4, 8, 16])
def test_any_number_of_processes_has_the_same_global_batches(processes: int) -> None:
    alone, each = DomainSchedule(state()), 16 // processes
    ranks = [DomainSchedule(state()) for _ in range(processes)]
    for step in range(60):
        whole = alone.draw()
        parts = [rank.draw(slice(number * each, (number + 1) * each)) for number, rank in enumerate(ranks)]
        for column in (0, 1):
            assert [row for part in parts for row in part[column]] == whole[column], step
    assert {rank.state for rank in ranks} == {alone.state}


def test_no_row_comes_twice_in_a_pass_and_passes_differ() -> None:
    schedule, seen = DomainSchedule(state()), dict[int, list[int]]()
    for domain, row in drawn(schedule, 200):
        seen.setdefault(domain, []).append(row)
    for domain, rows in seen.items():
        size = ROWS[domain]
        passes = [rows[first : first + size] for first in range(0, len(rows), size)]
        assert all(len(set(part)) == len(part) for part in passes)
        assert len(passes) == 1 or passes[0][: len(passes[1])] != passes[1]
    assert tuple(len(seen[domain]) for domain in range(7)) == schedule.state.used and len(seen[0]) > ROWS[0]


def test_a_state_continues_to_the_last_bit_also_through_its_text() -> None:
    whole = DomainSchedule(state())
    expected = drawn(whole, 40)
    first = DomainSchedule(state())
    assert drawn(first, 23) == expected[: 23 * 16]
    again = DomainSchedule(state_from_json(first.state.to_json(), "test"))
    assert again.state == first.state and drawn(again, 17) == expected[23 * 16 :]
    passed = DomainSchedule(state())
    passed.pass_over(23)
    assert passed.state == first.state


def test_new_proportions_hold_from_the_next_step() -> None:
    schedule = DomainSchedule(state(interval=2))
    drawn(schedule, 2)
    schedule.move(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert {domain for domain, _ in drawn(schedule, 2)} == {6}
    assert schedule.state.history == ((1, (0, 0, 0, 0, 0, 0, 1.0)),)


def test_exhausted_domains_leave_the_rest_to_the_others() -> None:
    rows = (20, 5, 5, 5, 5, 5, 5)
    schedule = DomainSchedule(state(rows, batch=10), "renormalise")
    found = drawn(schedule, 5)
    assert sorted(found) == [(domain, row) for domain, size in enumerate(rows) for row in range(size)]
    with pytest.raises(UserError, match="step 6: every domain .* is exhausted"):
        schedule.draw()
    free = DomainSchedule(state(rows, batch=10))
    assert drawn(free, 2) == found[:20]  # as long as nothing is exhausted the same samples
    passed = DomainSchedule(state(rows, batch=10), "renormalise")
    passed.pass_over(5)
    assert passed.state == schedule.state


def test_exhausted_may_be_an_error_before_anything_is_drawn() -> None:
    schedule = DomainSchedule(state((20, 5, 5, 5, 5, 5, 5), batch=10), "error")
    with pytest.raises(UserError, match="step 3: the domain d0 is exhausted"):
        drawn(schedule, 5)
    assert schedule.state.step == 2


def test_a_state_stays_below_ten_kilobytes() -> None:
    long = replace(state(), history=tuple((window, START) for window in range(5000)))
    text = long.to_json()
    assert len(text) <= LARGEST and json.loads(text)["history"][-1][0] == 4999
    many = state(tuple(range(10**9, 10**9 + 60)))
    assert len(many.to_json()) < LARGEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 18}, "its seed was 17, now it is 18: set seed to 17"),
        ({"batch": 32}, "a step took 16 rows, now it takes 32"),
        ({"interval": 40}, "eval_interval was 50, now it is 40: set it to 50 again"),
        ({"interval": 0}, "eval_interval was 50, now it is not set"),
        ({"names": "d0 d1 d2 d3 d4 d5"}, "now it is without d6: give the same domains"),
        ({"names": "d0 d1 d2 d3 d4 d5 new"}, "without d6, with new"),
        ({"names": "d1 d0 d2 d3 d4 d5 d6"}, "the order of its domains was d0, d1"),
        ({"rows": 51}, r"domain d1 had 50 rows \(fingerprint print1\), now it has 51 \(print1\)"),
        ({"fingerprint": "other"}, r"domain d1 had 50 rows .* now it has 50 \(other\)"),
    ],
)
def test_another_mixture_is_not_continued(change: dict, message: str) -> None:
    before, now = state(), state()
    check_continues(before, now, "a.ckpt")
    if "names" in change:
        held = {domain.name: domain for domain in now.domains}
        names = change["names"].split()
        now = replace(now, domains=tuple(held.get(name, Domain(name, 5, "")) for name in names))
    elif "rows" in change or "fingerprint" in change:
        now = replace(now, domains=(now.domains[0], replace(now.domains[1], **change), *now.domains[2:]))
    else:
        now = replace(now, **change)
    with pytest.raises(UserError, match=message):
        check_continues(before, now, "a.ckpt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "other 1"),
        ("global_step", -1),
        ("seed", 1.5),
        ("cursors", [1]),
        ("cursors", [True] * 7),
        ("passes", [2**61] * 7),
        ("rows", [0] * 7),
        ("domains", 5),
        ("domains", {"a": 1}),
        ("proportions", [0.5] * 7),
        ("proportions", [float("nan")] + [0.1] * 6),
        ("history", [[0]]),
        ("history", 7),
    ],
)
def test_a_damaged_state_is_refused(name: str, value: object) -> None:
    text = json.loads(state().to_json()) | {name: value}
    with pytest.raises(UserError, match="the state of the data mixture cannot be read"):
        state_from_json(json.dumps(text), "a.ckpt")
    for broken in ("", "[]", "{}", "null", "x" * (LARGEST + 1)):
        with pytest.raises(UserError, match="a.ckpt: the state of the data mixture cannot be read"):
            state_from_json(broken, "a.ckpt")
