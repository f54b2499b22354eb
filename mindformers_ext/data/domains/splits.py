# SPDX-License-Identifier: Apache-2.0
"""Which split a document falls into: by a hash of what it holds, so that copies of it fall into one and the same.

Hashes are dealt to 16384 slots. A split takes a range of slots of each domain, first eval, then for_prune, then for_ft,
as wide as what is asked of the domain. Where the ranges of two domains differ, a document of one may have a copy in the
other that fell into an earlier split: it is left out then, so that no two splits share a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from mindformers_ext.core.errors import Problems, UserError

SLOTS, SHIFT = 1 << 14, 64 - 14


def document_hash(ids: npt.NDArray[Any], seed: int) -> int:
    """64 bits of a document's token ids, so that a text and its ids fall together; another seed deals otherwise."""
    data = ids.astype("<i4").tobytes()
    return int.from_bytes(blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


@dataclass(frozen=True)
class Amount:
    """What a split is given: rows of each domain, or a share of the documents, or all that is left."""

    rows: Mapping[str, int] | None = None
    share: float | None = None
    rest: bool = False


@dataclass(frozen=True)
class Range:
    """What a domain gives to a split: documents in slots ``start`` to before ``end``, and of their rows the first
    ``rows`` (None: all)."""

    start: int
    end: int
    rows: int | None


def deal(
    split: str, amount: Amount, tokens: Mapping[str, npt.NDArray[np.int64]], starts: Mapping[str, int], seq_length: int
) -> dict[str, Range]:
    """The range of every domain in one split.

    Args:
        split: its name, for messages.
        amount: what the split is given.
        tokens: of each domain, tokens by slot.
        starts: of each domain, the first slot that no earlier split has.
        seq_length: tokens of a row.

    Raises:
        UserError: a domain has not as many rows as are asked of it.
    """
    problems, result = Problems("the splits"), {}
    for name, count in tokens.items():
        start = starts[name]
        if amount.share is not None or amount.rest:
            end = SLOTS if amount.share is None else min(SLOTS, start + round(amount.share * SLOTS))
            result[name] = Range(start, end, None)
            continue
        rows = (amount.rows or {})[name]
        result[name] = _enough(count, start, rows, seq_length)
        there = int(count[start:].sum()) // seq_length
        if rows > there:
            problems.add(
                f"{split} wants {rows} rows of {seq_length} tokens of {name}, which has {there} for it",
                "give more text, ask for fewer rows, use a smaller --seq_length, or shares of the documents",
            )
    problems.raise_if_any()
    return result


def _enough(count: npt.NDArray[np.int64], start: int, rows: int, seq_length: int) -> Range:
    """From ``start`` on as many slots as hold ``rows`` rows."""
    sums = np.cumsum(count[start:])
    slots = int(np.searchsorted(sums, rows * seq_length)) + 1 if rows else 0
    return Range(start, min(start + slots, SLOTS), rows)


def wanted_rows(name: str, value: float, unit: float, seq_length: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Rows of each domain for ``value`` times ``unit`` tokens in all, shared out by ``shares``; rounded as the
    reference does it: whole rows of all tokens first, then of each domain."""
    total = int(unit) // seq_length * value
    found = {domain: int(total * share) for domain, share in shares.items()}
    empty = [domain for domain, rows in found.items() if not rows and shares[domain]]
    if empty and value:
        raise UserError(
            f"--{name} {value:g} gives {', '.join(empty)} not one row of {seq_length} tokens: give more, or "
            f"--{name}_share"
        )
    return found


def read_shares(words: Sequence[str], domains: Sequence[str]) -> dict[str, float]:
    """Shares of the domains from ``NAME=SHARE`` words or bare numbers in the order of the domains; none: equal ones.

    Raises:
        UserError: an unknown or missing domain, or no share of 1.
    """
    if not words:
        return {name: 1 / len(domains) for name in domains}
    problems = Problems("--proportion")
    pairs = [word.partition("=")[::2] if "=" in word else (domain, word)
             for word, domain in zip(words, [*domains, *[""] * len(words)], strict=False)]  # fmt: skip
    found: dict[str, float] = {}
    for name, text in pairs:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in domains or name in found:
            problems.add(f"'{name}={text}'", f"give each of {', '.join(domains)} once")
        elif not 0 <= share <= 1:
            problems.add(f"'{name}={text}'", "give a share from 0 to 1")
        found[name] = share
    missing = [name for name in domains if name not in found]
    problems.add_names("domains", "have no share", missing, "give NAME=SHARE for each")
    if not problems.lines and abs(sum(found.values()) - 1) > 1e-3:
        problems.add(f"the shares sum to {sum(found.values()):g}", "make them sum to 1")
    problems.raise_if_any()
    return {name: found[name] for name in domains}
