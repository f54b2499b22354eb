# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask follows from a seed, so that a resumed run drops what the uninterrupted one would have dropped.

MindSpore's own operator keeps its generator's state inside its kernel, where no checkpoint can reach it.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

# Odd factors and shifts of a mixing function of 32 bits: multiplications that wrap, and exclusive or with itself
# shifted (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 3.2, in 32 bits).
FACTORS = tuple(int(np.uint32(factor).view(np.int32)) for factor in (0x9E3779B1, 0x7FEB352D, 0x846CA68B))


class SeededDropoutOp(nn.Cell):
    """Dropout of x (T, D) by the bits of ``seed`` (), int32: each element is kept with ``keep``, or becomes zero.

    Args:
        keep: the probability, above 0; what is kept is divided by it.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.scale = 1.0 / keep
        self.limit = Tensor(min(round(keep * 2**32) - 2**31, 2**31 - 1), ms.int32)  # of numbers from -2^31 on
        self.factors = tuple(Tensor(factor, ms.int32) for factor in FACTORS)

    def construct(self, x_TD: Tensor, seed: Tensor) -> Tensor:
        number_TD = ops.arange(0, x_TD.shape[0] * x_TD.shape[1], dtype=ms.int32).reshape(x_TD.shape)
        bits_TD = self.mixed(number_TD * self.factors[0], 15)
        bits_TD = self.mixed(ops.bitwise_xor(bits_TD, seed) * self.factors[1], 13)
        bits_TD = self.mixed(bits_TD * self.factors[2], 16)
        kept_TD = ops.cast(bits_TD < self.limit, x_TD.dtype)
        return x_TD * ops.stop_gradient(kept_TD * self.scale)

    def mixed(self, bits: Tensor, shift: int) -> Tensor:
        """Higher bits into lower ones; the shift of signed numbers repeats the sign, which is masked away."""
        low = ops.bitwise_and(ops.bitwise_right_shift(bits, shift), 2 ** (32 - shift) - 1)
        return ops.bitwise_xor(bits, low)
