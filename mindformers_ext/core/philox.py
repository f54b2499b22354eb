# SPDX-License-Identifier: Apache-2.0
"""MindSpore's initial weights from a seed, without MindSpore: one seed starts every engine from the same network.

Each parameter takes one 63-bit number from numpy's generator and draws from Philox4x32-10 (Salmon et al. 2011, section
3.3) by Box and Muller's transform in float32, as MindSpore's CPU initializers do. Equal to rounding of log, sin, cos.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
CHUNK = 1 << 20  # values drawn at once; even, so that pairs stay together
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
FACTORS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_FACTORS = np.uint64(FACTORS[0]), np.uint64(FACTORS[1])
_KEY_STEPS = np.uint64(KEY_STEPS[0]), np.uint64(KEY_STEPS[1])
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


def noise_keys(seed: int, step: int, rows: range) -> npt.NDArray[np.int32]:
    """What a training step's noise follows from, (rows, 3): the seed's low 32 bits, updates done before plus 1, and the
    row's number in the whole batch of the step, whoever holds it and however the batch is cut."""
    keys = np.empty((len(rows), 3), np.int64)
    keys[:, 0], keys[:, 1], keys[:, 2] = seed & 0xFFFFFFFF, step + 1, np.arange(rows.start, rows.stop)
    return keys.astype(np.int32)


def noise_blocks(tokens: int, experts: int) -> int:
    """Blocks of four values that one row takes of the stream for each mixture."""
    return -(-tokens * experts // 4)


def mixture_noise(keys: npt.NDArray[np.int32], place: int, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Standard normal noise (rows, tokens, experts) of mixture number ``place`` of a step.

    Both engines compute the same where they need it (``ms.ops.noise``, ``pt.ops.noise``); this is what they are held
    against.

    Args:
        keys: ``noise_keys``.
        place: of the mixture among all, from 0.
        shape: mixtures, tokens, experts.
    """
    mixtures, tokens, experts = shape
    blocks, found = noise_blocks(tokens, experts), []
    for low, step, row in keys.astype(np.int64) & 0xFFFFFFFF:
        first = (int(row) * mixtures + place) * blocks
        found.append(normal(int(step) << 32 | int(low), 4 * blocks, 1.0, first)[: tokens * experts])
    noise: npt.NDArray[np.float32] = np.stack(found).reshape(len(keys), tokens, experts)
    return noise
