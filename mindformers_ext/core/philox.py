# SPDX-License-Identifier: Apache-2.0
"""MindSpore's initial weights from a seed, without MindSpore: one seed starts every engine from the same network.

Each parameter takes one 63-bit number from numpy's generator and draws from Philox4x32-10 (Salmon et al. 2011, section
3.3) by Box and Muller's transform in float32, as MindSpore's CPU initializers do. Equal to rounding of log, sin, cos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
CHUNK = 1 << 20  # values drawn at once; even, so that pairs stay together
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_PI, _SMALLEST = np.float32(3.1415926), np.float32(1e-7)


def seeds(seed: int) -> Iterator[int]:
    """The parameters' own seeds, in the order in which MindSpore makes the parameters."""
    state = np.random.RandomState(seed)
    while True:
        yield int(state.randint(low=1, high=1 << 63, dtype=np.int64))


def philox(seed: int, first: int, blocks: int) -> npt.NDArray[np.uint32]:
    """Blocks ``first`` to ``first + blocks`` of the stream of ``seed``, four 32-bit words each: (4 * blocks)."""
    low, high = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    number = np.arange(first, first + blocks, dtype=np.uint64)
    a, b = number & _LOW, number >> _SHIFT
    c, d = np.full(blocks, low), np.full(blocks, high)
    key = low, high
    for _ in range(10):
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
        uniform = ((bits & np.uint32(0x7FFFFF)) | np.uint32(127 << 23)).view(np.float32) - np.float32(1)
        uniform = np.maximum(uniform, _SMALLEST)
        radius = np.sqrt(np.float32(-2) * np.log(uniform[0::2])) * np.float32(std)
        angle = np.float32(2) * _PI * uniform[1::2]
        part[0::2], part[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return result[:count]


def step_noise(seed: int, step: int, rows: range, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise of one training step, (rows, *shape).

    A row's values follow from its number in the whole batch of the step, whoever holds it and however the batch is cut.

    Args:
        seed: of the run.
        step: updates done before.
        rows: the rows at hand.
        shape: of one row's noise.
    """
    count = math.prod(shape)
    blocks, key = -(-count // 4), (step + 1) << 32 | seed & 0xFFFFFFFF
    drawn = normal(key, len(rows) * blocks * 4, 1.0, rows.start * blocks)
    return drawn.reshape(len(rows), -1)[:, :count].reshape(len(rows), *shape)
