# SPDX-License-Identifier: Apache-2.0
"""Expert capacity in whole numbers, shared by every engine."""

from __future__ import annotations

import math


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def expert_capacity(chosen: int, tokens: int, factor: float, experts: int, multiple: int = 1) -> int:
    """Slots per expert: ceil(k N f / E), at most N, then rounded up to ``multiple`` (MindFormers' capacity v2).

    Rounding comes after the minimum, as in MindFormers, so the result may exceed ``tokens``.

    Args:
        chosen: experts per token, k.
        tokens: tokens of one routing group, N.
        factor: capacity factor, above 0.
        experts: experts, E.
        multiple: model parallel size times the degree of overlapped communication.
    """
    if factor <= 0:
        raise ValueError(f"capacity factor {factor} means dropless: the capacity follows from the load")
    return round_up(min(math.ceil(chosen * tokens * factor / experts), tokens), multiple)
