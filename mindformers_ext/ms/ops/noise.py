# SPDX-License-Identifier: Apache-2.0
"""The noise of gates that add it, drawn where it is needed: ``core.philox`` inside a graph.

Philox4x32-10 in 64-bit integers, whose products wrap as they should, and Box and Muller's transform.
"""

from __future__ import annotations

import math
from functools import partial

import mindspore as ms
import mindspore.ops.operations as P
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.core.philox import FACTORS, FRACTION, KEY_STEPS, LOW, PI, ROUNDS, SMALLEST, noise_blocks
from mindformers_ext.ms.strategies import Shards

TURN = 2.0 * PI


def _whole(value: int) -> Tensor:
    return Tensor(value, ms.int64)


class Philox(nn.Cell):
    """Four words (rows, blocks, 4) below 2^32, int64, of numbered blocks (rows, blocks) under two key words (rows, 1)
    (Salmon et al. 2011, section 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.half = _whole(LOW), _whole(32)
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
    """Noise (B*S, P*E) float32 of P mixtures, one beside the other, from keys (B, 3) int32 (``core.philox``).

    ``places``: their numbers. ``shape``: of all mixtures, tokens, experts. It has no gradient, and says so: MindSpore
    would compile one.
    """

    def __init__(self, places: tuple[int, ...], shape: tuple[int, int, int]) -> None:
        super().__init__(auto_prefix=False)
        self.count, (mixtures, self.tokens, self.experts) = len(places), shape
        blocks = noise_blocks(self.tokens, self.experts)
        number = np.arange(blocks)[None] + np.array(places)[:, None] * blocks
        self.blocks, self.per_row = Tensor(number.reshape(1, -1)), _whole(mixtures * blocks)
        self.mask, self.bits = _whole(LOW), _whole(FRACTION)
        self.philox, self.both, self.stack, self.transpose = Philox(), P.BitwiseAnd(), P.Stack(axis=-1), P.Transpose()
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
        turn, more = ops.maximum(uniform[1], SMALLEST) * TURN, ops.maximum(uniform[3], SMALLEST) * TURN
        drawn = (near * self.cos(turn), near * self.sin(turn), far * self.cos(more), far * self.sin(more))
        values = self.tokens * self.experts
        row = ops.reshape(self.stack(drawn), (keys_B3.shape[0], self.count, -1))[:, :, :values]
        noise = ops.reshape(row, (-1, self.count, self.tokens, self.experts))
        return ops.reshape(self.transpose(noise, (0, 2, 1, 3)), (-1, self.count * self.experts))

    def bprop(self, keys_B3: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.zeros_like(keys_B3),)


class StageNoise(nn.Cell):
    """The same as a tuple of (B*S, E), one for each mixture; a cell of their pipeline stage."""

    def __init__(self, places: tuple[int, ...], shape: tuple[int, int, int], shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        _, tokens, experts = shape
        whole = partial(_noise_shape, tokens, len(places) * experts)
        self.draw = shards.local(MixtureNoise(places, shape), "noise", whole, _noise_type)
        self.split = shards.shard(P.Split(axis=1, output_num=len(places)), "noises")

    def construct(self, keys_B3: Tensor) -> tuple[Tensor, ...]:
        return self.split(self.draw(keys_B3))


def _noise_shape(tokens: int, width: int, keys: list) -> list:
    return [keys[0] * tokens, width]


def _noise_type(keys: ms.Type) -> ms.Type:
    return ms.TensorType(ms.float32)
