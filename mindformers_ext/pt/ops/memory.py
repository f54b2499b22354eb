# SPDX-License-Identifier: Apache-2.0
"""Main memory that is used again instead of given back: the gradients of experts are large and come every step.

glibc maps every block above 32 MB anew and unmaps it when it is freed, so each step would touch fresh pages: a third of
the time of an expert layer of 512 x 1792 with 64 tokens. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on freed blocks stay with this process, for its next ones; False where the C library has no such way."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> None:
    """What is free now goes back to the system, once: after weights have come, or lie in another order."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
