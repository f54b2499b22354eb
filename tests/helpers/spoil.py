# SPDX-License-Identifier: Apache-2.0
"""General ways to spoil a text or bytes of any format, from a seed."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

from tests.helpers.fuzz_weights import HOSTILE

HUGE = [
    "9" * 5000,
    "-" + "9" * 5000,
    "1e999",
    "[" * 100_000,
    "[" + "[]," * 2_000_000 + "1]",
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud800"',
    "\x00",
    "\ufeff{}",
    "NaN",
    '{"a": 1, "a": 2}',
]
KINDS = [*HOSTILE, [[1], {}], ["a"] * 40, [1] * 33, {"a": {"b": []}}, "\ud800", "a\0b", "~nosuchuser/x", 10**400]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside ``value``."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from leaves(item, (*path, key))


def other_value(value: Any, rng: random.Random) -> Any:
    """A copy of ``value`` in which one value is of another kind, gone, or under another name."""
    result = copy.deepcopy(value)
    path = rng.choice(list(leaves(result)))
    here = result
    for key in path[:-1]:
        here = here[key]
    kind = rng.randrange(8)
    if kind == 0:
        del here[path[-1]]
    elif kind == 1 and isinstance(here, dict):
        here[str(path[-1]) + rng.choice(["x", "\ud800", "\0", ".", "é"])] = here.pop(path[-1])
    else:
        here[path[-1]] = rng.choice(KINDS)
    return result


def spoiled_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, filled in or replaced."""
    at, size = rng.randrange(len(data)), rng.randrange(1, 40)
    kind = rng.randrange(7)
    if kind < 3:  # in the first bytes most files say what they are
        flipped = bytearray(data)
        flipped[at if kind else at % 64] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + data[at : at + size] * 2 + data[at + size :]
    if kind == 5:
        return data[:at] + rng.randbytes(size) + data[at:]
    return rng.choice([b"", b"\0" * 4096, rng.randbytes(3000), b"\xff" * 64, data * 2])


def spoiled_json(text: str, rng: random.Random) -> bytes:
    """A JSON text with a value changed, one made huge, or bytes spoiled."""
    kind = rng.randrange(6)
    if kind < 3:
        changed = other_value(json.loads(text), rng)
        with unlimited_digits():
            return json.dumps(changed).encode()
    if kind == 3:
        names = list(re.finditer(r": ", text))
        at = rng.choice(names).end() if names else 0
        end = next((i for i in range(at, len(text)) if text[i] in ",}]"), len(text))
        return (text[:at] + rng.choice(HUGE) + text[end:]).encode()
    if kind == 4:
        return rng.choice(HUGE).encode("utf-8", "surrogatepass")
    return spoiled_bytes(text.encode(), rng)


@contextlib.contextmanager
def unlimited_digits() -> Iterator[None]:
    """Python refuses to write integers of more than 4300 digits."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


YAML_VALUES = [
    "2001-13-45",
    "!!int abc",
    "!!bool maybe",
    "!!python/object/apply:os.system [ls]",
    "9" * 5000,
    "0x" + "f" * 400,
    "1:2:3:99",
    "0b2",
    ".inf",
    ".nan",
    "-1",
    "0",
    "1e999",
    "[1, [2, {a: b}]]",
    "{a: &x [*x]}",
    "*nothing",
    "~",
    "'",
    "? [a]",
    "- - - -",
    "\t1",
    "| a",
    "<<: 5",
    "[" * 60,
    "[" + "1, " * 60_000 + "1]",
    '"\\ud800"',
    '"a\\0b"',
    "~nosuchuser/x",
    "",
]


def spoiled_yaml(text: str, rng: random.Random) -> bytes:
    """A YAML text with one value, or one name, replaced; or bytes spoiled."""
    if rng.random() < 0.2:
        return spoiled_bytes(text.encode(), rng)
    places = list(re.finditer(r"(?<=: )[^,\n{}\[\]]+|\b\w+(?=:)", text))
    place = rng.choice(places)
    return (text[: place.start()] + rng.choice(YAML_VALUES) + text[place.end() :]).encode("utf-8", "surrogatepass")


def other_word(value: Any, words: list[Any], rng: random.Random) -> Any:
    """A copy of ``value`` (what a YAML holds) with one leaf made another one of its kind: what is read stays a file of
    this format, so that code behind the first checks is reached. ``words`` are texts that mean something in it."""
    result = copy.deepcopy(value)
    path = rng.choice(list(leaves(result)))
    here = result
    for key in path[:-1]:
        here = here[key]
    old = here[path[-1]]
    if isinstance(old, dict):
        here[path[-1]] = {**old, rng.choice(words): rng.choice([*NUMBERS, *words])}
    elif isinstance(old, list):
        here[path[-1]] = rng.choice([old[::-1], old[:-1], old + old[:1], [old, old], [], [*NUMBERS[:3]]])
    elif isinstance(old, bool):
        here[path[-1]] = rng.choice([not old, None, "auto"])
    elif isinstance(old, (int, float)):
        here[path[-1]] = rng.choice([*NUMBERS, old + 1, -old, old / 3, old * 1000, [old, 1.0], [old]])
    else:
        here[path[-1]] = rng.choice([*words, None, "", str(old) + "x", [old]])
    if isinstance(here, dict) and rng.random() < 0.15:
        here[rng.choice(words)] = here.pop(path[-1])
    return result


NUMBERS = [0, 1, 2, -1, 0.5, 1.0, 1.5, 1e-9, 1e9, 1e300, 7, 1000]
