# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank sends for a collective, by the algorithms that move least."""

from __future__ import annotations

from collections.abc import Callable

# With n ranks and a payload of S bytes (the whole tensor): ring algorithms, as in Thakur, Rabenseifner and Gropp,
# "Optimization of Collective Communication Operations in MPICH" (2005).
_SENT: dict[str, Callable[[int, int], float]] = {
    "AllReduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "AllGather": lambda size, ranks: size * (ranks - 1) / ranks,
    "ReduceScatter": lambda size, ranks: size * (ranks - 1) / ranks,
    "AlltoAll": lambda size, ranks: size * (ranks - 1) / ranks,
    "AlltoAllV": lambda size, ranks: size * (ranks - 1) / ranks,  # where every rank gets as much
    "AllToAllv": lambda size, ranks: size * (ranks - 1) / ranks,
    "Broadcast": lambda size, ranks: size if ranks > 1 else 0,
    "Send": lambda size, ranks: size,
    "Receive": lambda size, ranks: 0,
}


def sent_bytes(kind: str, payload: int, ranks: int) -> int:
    """Bytes one of ``ranks`` members sends in one ``kind`` about ``payload`` bytes.

    The payload is the whole tensor: the gathered one of an AllGather, the unscattered one of a ReduceScatter.

    Raises:
        ValueError: ``kind`` is no collective.
    """
    if kind not in _SENT:
        raise ValueError(f"{kind!r} is no collective: choose one of {', '.join(_SENT)}")
    return round(_SENT[kind](payload, max(ranks, 1)))
