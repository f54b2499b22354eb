# SPDX-License-Identifier: Apache-2.0
"""The noise of gates that add it, drawn where it is needed: ``core.philox.mixture_noise`` inside a graph.

Philox4x32-10 in 64-bit integers, whose products wrap as they should, and Box and Muller's transform.
"""

from __future__ import annotations

import math

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.philox import FACTORS, KEY_STEPS, noise_blocks

ROUNDS, SMALLEST = 10, 1e-7  # of a uniform number, which 0 counts as


def _whole(value: int) -> Tensor:
    return Tensor(value, ms.int64)


class Philox(nn.Cell):
    """Four words (rows, blocks, 4) below 2^32, int64, of numbered blocks (rows, blocks) under two key words (rows, 1)
    (Salmon et al. 2011, section 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.half = _whole(0xFFFFFFFF), _whole(32)
        self.factors, self.steps = tuple(map(_whole, FACTORS)), tuple(map(_whole, KEY_STEPS))
        self.both, self.either, self.shift = P.BitwiseAnd(), P.BitwiseXor(), P.RightShift()
        self.stack = P.Stack(axis=-1)

    def _low(self, x: Tensor) -> Tensor:
        return self.both(x, self.mask)

    def _high(self, x: Tensor) -> Tensor:
        return self._low(self.shift(x, self.half))

    def construct(self, number: Tensor, low: Tensor, high: Tensor) -> Tensor:
        a, b = self._low(number), self._high(number)
        c, d = ops.broadcast_to(low, number.shape), ops.broadcast_to(high, number.shape)
        left_key, right_key = low, high
        for _ in range(ROUNDS):
            left, right = a * self.factors[0], c * self.factors[1]
            a, b = self.either(self.either(self._high(right), b), left_key), self._low(right)
            c, d = self.either(self.either(self._high(left), d), right_key), self._low(left)
            left_key, right_key = self._low(left_key + self.steps[0]), self._low(right_key + self.steps[1])
        return self.stack((a, b, c, d))


class MixtureNoise(nn.Cell):
    """Noise (B*S, E) float32 of mixture ``place`` from keys (B, 3) int32 (``core.philox.noise_keys``).

    ``shape``: mixtures, tokens, experts.
    """

    def __init__(self, place: int, shape: tuple[int, int, int]) -> None:
        super().__init__(auto_prefix=False)
        self.mixtures, self.tokens, self.experts = shape
        blocks = noise_blocks(self.tokens, self.experts)
        self.blocks, self.per_row = Tensor(np.arange(blocks)[None] + place * blocks), _whole(self.mixtures * blocks)
        self.mask, self.bits = _whole(0xFFFFFFFF), _whole(0x7FFFFF)
        self.philox, self.both, self.stack = Philox(), P.BitwiseAnd(), P.Stack(axis=-1)
        self.log1p, self.cos, self.sin, self.sqrt = P.Log1p(), P.Cos(), P.Sin(), P.Sqrt()
        self.split = P.Split(axis=2, output_num=4)

    def _radius(self, uniform: Tensor) -> Tensor:
        """sqrt(-2 log u); by log1p, since MindSpore's log on CPU is off by 2e-6."""
        least = 2.0**-23
        none = ops.cast(uniform < least, ms.float32) * (math.log(SMALLEST) - math.log(least))
        return self.sqrt(-2.0 * (self.log1p(ops.maximum(uniform, least) - 1.0) + none))

    def construct(self, keys_B3: Tensor) -> Tensor:
        key = self.both(ops.cast(keys_B3, ms.int64), self.mask)
        words = self.philox(key[:, 2:3] * self.per_row + self.blocks, key[:, 0:1], key[:, 1:2])
        uniform = self.split(ops.cast(self.both(words, self.bits), ms.float32) * 2.0**-23)
        near, far = self._radius(uniform[0]), self._radius(uniform[2])
        turn, more = ops.maximum(uniform[1], SMALLEST) * _TURN, ops.maximum(uniform[3], SMALLEST) * _TURN
        drawn = (near * self.cos(turn), near * self.sin(turn), far * self.cos(more), far * self.sin(more))
        row = ops.reshape(self.stack(drawn), (keys_B3.shape[0], -1))[:, : self.tokens * self.experts]
        return ops.reshape(row, (-1, self.experts))


_TURN = 2.0 * 3.1415926  # as ``core.philox``, that is MindSpore, has it


def noise_shape(shape: tuple[int, int, int], keys: list) -> list:
    """Of ``MixtureNoise``, for MindSpore's cut graph."""
    return [keys[0] * shape[1], shape[2]]
