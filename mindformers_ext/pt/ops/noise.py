# SPDX-License-Identifier: Apache-2.0
"""The noise of gates that add it, drawn where it is needed: ``core.philox.mixture_noise`` on any device.

Philox4x32-10 in 64-bit integers, whose products wrap as they should, and Box and Muller's transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindformers_ext.core.philox import FACTORS, KEY_STEPS, noise_blocks

ROUNDS, SMALLEST = 10, 1e-7  # of a uniform number, which 0 counts as
MASK = 0xFFFFFFFF
TURN = 2.0 * 3.1415926  # as ``core.philox`` has it


def mixture_noise(keys_B3: Tensor, place: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise (B*S, E) float32 of mixture ``place``; see ``core.philox.mixture_noise``."""
    mixtures, tokens, experts = shape
    blocks = noise_blocks(tokens, experts)
    low, high, row = (keys_B3.to(torch.int64) & MASK).split(1, 1)
    number = (row * mixtures + place) * blocks + torch.arange(blocks, device=keys_B3.device)
    words = torch.stack(_philox(number, low, high), -1).view(len(keys_B3), -1, 2)
    uniform = ((words & 0x7FFFFF).float() * 2.0**-23).clamp(min=SMALLEST)
    radius, angle = torch.sqrt(-2.0 * torch.log(uniform[..., 0])), TURN * uniform[..., 1]
    drawn = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)
    return drawn[:, : tokens * experts].reshape(-1, experts)


def _philox(number: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words below 2^32 of each numbered block (Salmon et al. 2011, section 3.3)."""
    a, b = number & MASK, number >> 32 & MASK
    c, d = low.expand_as(number), high.expand_as(number)
    for _ in range(ROUNDS):
        left, right = a * FACTORS[0], c * FACTORS[1]
        a, b = (right >> 32 & MASK) ^ b ^ low, right & MASK
        c, d = (left >> 32 & MASK) ^ d ^ high, left & MASK
        low, high = low + KEY_STEPS[0] & MASK, high + KEY_STEPS[1] & MASK
    return a, b, c, d
