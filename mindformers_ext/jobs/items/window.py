# SPDX-License-Identifier: Apache-2.0
"""Items handed out while others are under way, few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

WINDOW = 3  # items per process under way: enough to hide waiting, few enough for any memory


class Handing(Protocol):
    """Who works on items."""

    @property
    def size(self) -> int:
        """Processes, now."""
        ...

    def submit(self, item: Any) -> Any:
        """Begin an item; gives its ticket."""
        ...

    def result(self, ticket: Any) -> Any:
        """Wait for the item of ``ticket``."""
        ...

    def finished(self) -> Any:
        """Wait for any item that was begun and not asked for; gives its result."""
        ...


def windowed(team: Handing, items: Iterable[Any], ordered: bool) -> Iterator[Any]:
    """Every result, in order or as they are finished."""
    waiting: deque[Any] = deque()

    def following() -> Any:
        ticket = waiting.popleft()
        return team.result(ticket) if ordered else team.finished()

    for item in items:
        waiting.append(team.submit(item))
        while len(waiting) >= WINDOW * team.size:
            yield following()
    while waiting:
        yield following()
