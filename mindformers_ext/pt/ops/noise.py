# SPDX-License-Identifier: Apache-2.0
"""The noise of gates that add it, drawn where it is needed: ``core.philox`` on any device.

Philox4x32-10 in 64-bit integers, whose products wrap as they should, and Box and Muller's transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindformers_ext.core.philox import FACTORS, FRACTION, KEY_STEPS, LOW, PI, ROUNDS, SMALLEST, noise_blocks

TURN = 2.0 * PI


def mixture_noise(keys_B3: Tensor, place: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B*S, E) float32 of mixture ``place`` of a step.

    Args:
        keys_B3: ``core.philox.noise_keys``.
        place: of the mixture among all, from 0.
        shape: mixtures, tokens, experts.
    """
    mixtures, tokens, experts = shape
    blocks = noise_blocks(tokens, experts)
    low, high, row = (keys_B3.to(torch.int64) & LOW).split(1, 1)
    number = (row * mixtures + place) * blocks + torch.arange(blocks, device=keys_B3.device)
    words = torch.stack(_philox(number, low, high), -1).view(len(keys_B3), -1, 2)
    uniform = ((words & FRACTION).float() * 2.0**-23).clamp(min=SMALLEST)
    radius, angle = torch.sqrt(-2.0 * torch.log(uniform[..., 0])), TURN * uniform[..., 1]
    drawn = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)
    return drawn[:, : tokens * experts].reshape(-1, experts)


def _philox(number: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words below 2^32 of each numbered block (Salmon et al. 2011, section 3.3)."""
    a, b = number & LOW, number >> 32 & LOW
    c, d = low.expand_as(number), high.expand_as(number)
    for _ in range(ROUNDS):
        left, right = a * FACTORS[0], c * FACTORS[1]
        a, b = (right >> 32 & LOW) ^ b ^ low, right & LOW
        c, d = (left >> 32 & LOW) ^ d ^ high, left & LOW
        low, high = low + KEY_STEPS[0] & LOW, high + KEY_STEPS[1] & LOW
    return a, b, c, d
