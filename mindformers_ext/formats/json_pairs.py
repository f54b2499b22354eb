# SPDX-License-Identifier: Apache-2.0
"""JSON objects that name nothing twice: Python's reader keeps the last of two and drops the first silently."""

from __future__ import annotations

from typing import Any


class TwiceError(ValueError):
    """A name that an object holds twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the name '{name}' occurs twice")
        self.name = name


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``, for ``object_pairs_hook`` of json; a name that occurs twice is a ``TwiceError``."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(next(name for name in names if names.count(name) > 1))
    return result
