# SPDX-License-Identifier: Apache-2.0
"""MindSpore's initial weights from a seed, without MindSpore: one seed starts every engine from the same network.

Each parameter takes one 63-bit number from numpy's generator and draws from Philox4x32-10 (Salmon et al. 2011, section
3.3) by Box and Muller's transform in float32, as MindSpore's CPU initializers do. Equal to rounding of log, sin, cos.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 20  # values drawn at once; even, so that pairs stay together
FACTORS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW, FRACTION = 0xFFFFFFFF, 0x7FFFFF  # bits of a word; those that make a number from 0 to 1
PI, SMALLEST = 3.1415926, 1e-7  # as MindSpore has them; the second is what 0 counts as before a logarithm
_FACTORS = np.uint64(FACTORS[0]), np.uint64(FACTORS[1])
_KEY_STEPS = np.uint64(KEY_STEPS[0]), np.uint64(KEY_STEPS[1])
_LOW, _SHIFT, _FRACTION = np.uint64(LOW), np.uint64(32), np.uint32(FRACTION)
_PI, _SMALLEST = np.float32(PI), np.float32(SMALLEST)


def seeds(seed: int) -> Iterator[int]:
    """The parameters' own seeds, in the order in which MindSpore makes the parameters."""
    state = np.random.RandomState(seed)
    while True:
        yield int(state.randint(low=1, high=1 << 63, dtype=np.int64))


def philox(seed: int, first: int, blocks: int) -> npt.NDArray[np.uint32]:
    """Blocks ``first`` to ``first + blocks`` of the stream of ``seed``, four 32-bit words each: (4 * blocks)."""
    low, high = np.uint64(seed & LOW), np.uint64(seed >> 32)
    number = np.arange(first, first + blocks, dtype=np.uint64)
    a, b = number & _LOW, number >> _SHIFT
    c, d = np.full(blocks, low), np.full(blocks, high)
    key = low, high
    for _ in range(ROUNDS):
        left, right = a * _FACTORS[0], c * _FACTORS[1]
        a, b, c, d = (right >> _SHIFT) ^ b ^ key[0], right & _LOW, (left >> _SHIFT) ^ d ^ key[1], left & _LOW
        key = (key[0] + _KEY_STEPS[0]) & _LOW, (key[1] + _KEY_STEPS[1]) & _LOW
    words: npt.NDArray[np.uint32] = np.stack((a, b, c, d), 1).reshape(-1).astype(np.uint32)
    return words


def normal(seed: int, count: int, std: float, first: int = 0) -> npt.NDArray[np.float32]:
    """``count`` values of mean 0 and standard deviation ``std``, float32, from block ``first`` of the stream."""
    result = np.empty(count + count % 2, np.float32)
    for start in range(0, len(result), CHUNK):
        part = result[start : start + CHUNK]
        bits = philox(seed, first + start // 4, -(-len(part) // 4))[: len(part)]
        uniform = ((bits & _FRACTION) | np.uint32(127 << 23)).view(np.float32) - np.float32(1)
        uniform = np.maximum(uniform, _SMALLEST)
        radius = np.sqrt(np.float32(-2) * np.log(uniform[0::2])) * np.float32(std)
        angle = np.float32(2) * _PI * uniform[1::2]
        part[0::2], part[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return result[:count]


def noise_keys(seed: int, step: int, rows: range) -> npt.NDArray[np.int32]:
    """What a training step's noise follows from, (rows, 3): the seed's low 32 bits, updates done before plus 1, and the
    row's number in the whole batch of the step, whoever holds it and however the batch is cut."""
    keys = np.empty((len(rows), 3), np.int64)
    keys[:, 0], keys[:, 1], keys[:, 2] = seed & LOW, step + 1, np.arange(rows.start, rows.stop)
    return keys.astype(np.int32)


def noise_blocks(tokens: int, experts: int) -> int:
    """Blocks of four values that one row takes of a step's stream for each mixture; mixture number p of P has those
    from (row P + p) times these on. Both engines draw them where they need them (``ms.ops.noise``, ``pt.ops.noise``)
    and are held against ``tests/helpers/noise.py``."""
    return -(-tokens * experts // 4)
