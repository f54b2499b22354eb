# SPDX-License-Identifier: Apache-2.0
"""The one way a job maps work over items: here, in processes, or on a Ray cluster; the same results everywhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mindformers_ext.jobs.items.processes import Team
from mindformers_ext.jobs.items.ray_cluster import RayTeam
from mindformers_ext.jobs.items.window import windowed

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[State, Item, Result]):
    """What is done with each item: ``do(start(*given), item)``, where ``start`` runs once in every process.

    Functions stand at the top of a module and ``given`` can be pickled: both travel to other processes and machines.
    """

    name: str  # as messages call it: "tokenising"
    do: Callable[[State, Item], Result]
    start: Callable[..., State]
    given: tuple[Any, ...] = ()
    end: Callable[[State], object] | None = None  # in this process only; others end as a whole
    advice: str = "use fewer --workers"  # where a process was killed


@dataclass(frozen=True)
class Place:
    """Where items are worked on: ``workers`` processes of this machine (1: this one), or all cores of a cluster.

    ``fork``: processes begin as copies of this one, with its ``start`` done; only where no thread runs yet. Others
    start from nothing and share the machine's cores among their threads.
    """

    workers: int = 1
    ray: str | None = None
    fork: bool = False


def map_items(
    work: Work[State, Item, Result], items: Iterable[Item], place: Place, ordered: bool = True
) -> Generator[Result, None, None]:
    """The result of every item, in the order of the items or, not ``ordered``, as they are finished.

    Few items are under way at once, so neither items nor results fill the memory. A process that a cluster loses costs
    the items it had, which are done again elsewhere. Nothing outlives the generator.

    Raises:
        UserError: what ``work`` raises; a process of this machine was killed; the cluster does not answer.
    """
    if place.ray is None and place.workers == 1:
        yield from _here(work, items)
        return
    team = Team(work, place.workers, place.fork, ordered) if place.ray is None else RayTeam(work, place.ray, ordered)
    try:
        yield from windowed(team, items, ordered)
    finally:
        team.close()


def _here(work: Work[State, Item, Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    state = work.start(*work.given)
    try:
        for item in items:
            yield work.do(state, item)
    finally:
        if work.end is not None:
            work.end(state)
