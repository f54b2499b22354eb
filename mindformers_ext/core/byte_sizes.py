# SPDX-License-Identifier: Apache-2.0
"""Numbers of bytes as people write and read them: "64GB" is 64 * 10^9, "64GiB" 64 * 2^30."""

from __future__ import annotations

import re

from mindformers_ext.core.errors import UserError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for ending, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)")


def read_size(text: str, name: str, bare: bool = False) -> int:
    """Bytes of "5GB", "500 mb", "2GiB" and, with ``bare``, of a number without a unit; ``name``: what holds the text.

    Raises:
        UserError: anything else, or nothing at all (0).
    """
    match = _SIZE.fullmatch(text.strip().upper())
    factor = UNITS.get(match[2]) if match and (bare or match[2]) else None
    size = round(float(match[1]) * factor) if match and factor else 0
    if size <= 0:
        raise UserError(f"{name} {text!r}: write a number and a unit, for example 64GB, 2.5GB, 500MB or 2GiB")
    return size


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of 1000: "999 B", "1.50 MB"."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
