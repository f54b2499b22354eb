# SPDX-License-Identifier: Apache-2.0
"""Work over items: the same results here and in processes, in order, few at a time, and what is said when one dies."""

from __future__ import annotations

import os
import signal

import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.items.map_items import Place, Work, map_items
from mindformers_ext.jobs.items.window import WINDOW, windowed


def begin(first: int) -> list[int]:
    return [first]


def add(state: list[int], item: int) -> int:
    if item == 1000:
        raise UserError("no such item")
    if item == 1001:
        os.kill(os.getpid(), signal.SIGKILL)
    return state[0] + item


WORK = Work("adding", add, begin, (7,), advice="try again")


@pytest.mark.parametrize("place", [Place(), Place(2, fork=True), Place(2)], ids=["here", "forked", "spawned"])
def test_results_come_in_order_or_as_they_end(place: Place) -> None:
    assert list(map_items(WORK, iter(range(20)), place)) == list(range(7, 27))
    assert sorted(map_items(WORK, range(20), place, ordered=False)) == list(range(7, 27))


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_and_a_killed_process_are_told(ordered: bool) -> None:
    with pytest.raises(UserError, match="no such item"):
        list(map_items(WORK, [1, 2, 1000, 3], Place(2, fork=True), ordered))
    with pytest.raises(UserError, match=r"a process of adding ended before its work was done.*: try again"):
        list(map_items(WORK, [1, 2, 1001, 3], Place(2, fork=True), ordered))


def test_the_end_is_called_however_it_ends() -> None:
    ended: list[object] = []
    work = Work("adding", add, begin, (7,), ended.append)
    found = map_items(work, range(5), Place())
    assert next(found) == 7
    found.close()
    assert ended == [[7]]


class Slow:
    """A team that counts how much it was given and not yet asked for."""

    size = 2

    def __init__(self) -> None:
        self.held: list[int] = []
        self.most = 0

    def submit(self, item: int) -> int:
        self.held.append(item)
        self.most = max(self.most, len(self.held))
        return item

    def result(self, ticket: int) -> int:
        self.held.remove(ticket)
        return ticket

    def finished(self) -> int:
        return self.held.pop()


@pytest.mark.parametrize("ordered", [True, False])
def test_few_items_are_under_way(ordered: bool) -> None:
    team, items = Slow(), iter(range(100))
    found = windowed(team, items, ordered)
    next(found)
    assert next(items) == WINDOW * 2, "more was read than is under way"
    assert len(list(found)) == 98 and team.most <= WINDOW * 2 and not team.held
