# SPDX-License-Identifier: Apache-2.0
"""One YAML value read as the kind its key wants; anything else becomes a problem that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.config.keys import MODES
from mindformers_ext.core.errors import Problems
from mindformers_ext.core.layers import DTYPE_NAMES, DTYPE_WORDS, dtype_name


def read_value(name: str, value: Any, kind: str, default: Any, problems: Problems) -> Any:
    """``value`` as ``kind`` (int, float, bool, str, dtype, mode, layers, ids, factors, sizes); null means ``default``.

    Returns the default and records a problem where the value is of another kind. ``ids`` gives a tuple of ints,
    ``factors`` a number or a tuple of them, ``sizes`` a tuple of tuples of ints.
    """
    if value is None:
        value = default
    if value is None:
        return None
    reader, wanted = _READERS[kind]
    found = reader(value)
    if found is None:
        problems.add(f"{name}={value!r} is not {wanted}", "correct it or leave the key out")
        return reader(default) if default is not None else None
    return found


def section_at(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The section with this dotted path ("" = all); empty where there is none."""
    found: Any = config
    for name in path.split(".") if path else ():
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)  # YAML 1.1 reads 1e-5, without a dot, as text
    except (ValueError, OverflowError):  # text of another kind; an integer beyond all floats
        return None
    return number if math.isfinite(number) else None


def _bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mode(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    if isinstance(value, str):  # some of MindFormers' own files quote the number, others write capitals
        value = int(value) if value in map(str, MODES) else value.lower()
    return value if value in (*MODES.values(), "stand_alone") else MODES.get(value)


def _ids(value: Any) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values if values and all(_int(item) is not None for item in values) else None


def _layers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, (list, tuple)) or any(_int(item) is None for item in value):
        return None
    return tuple(value)


def _factors(value: Any) -> float | tuple[float, ...] | None:
    if not isinstance(value, (list, tuple)):
        return _float(value)
    numbers = tuple(number for item in value if (number := _float(item)) is not None)
    return numbers if numbers and len(numbers) == len(value) else None


def _sizes(value: Any) -> tuple[tuple[int, ...], ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    rows = tuple(sizes for row in value if (sizes := _layers(row)))
    return rows if rows and len(rows) == len(value) else None


_READERS: dict[str, tuple[Any, str]] = {
    "int": (_int, "a whole number"),
    "float": (_float, "a finite number"),
    "bool": (_bool, "True or False"),
    "str": (_str, "a text"),
    "dtype": (dtype_name, "one of " + ", ".join((*DTYPE_NAMES, *DTYPE_WORDS))),
    "mode": (_mode, "one of " + ", ".join(f"{number} ({name})" for number, name in MODES.items())),
    "layers": (_layers, "a list of layer numbers from 0"),
    "ids": (_ids, "a token id or a list of token ids"),
    "factors": (_factors, "a finite number, or a list with one per layer"),
    "sizes": (_sizes, "a list per layer of the sizes of its experts"),
}
