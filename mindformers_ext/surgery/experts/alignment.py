# SPDX-License-Identifier: Apache-2.0
"""Outputs of a mixture brought to a dense layer's mean and variance, channel by channel (LLaMA-MoE v2's alignment)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-12  # of a variance that a channel is divided by; below it a channel is only moved


@dataclass(frozen=True, eq=False)
class Moments:
    """How many tokens there were, and float64 (D) of their channels: the mean, and the variance over all of them."""

    number: int
    mean: np.ndarray
    variance: np.ndarray

    @staticmethod
    def of(x: np.ndarray) -> Moments:
        """Of tokens (n, D), at least one; NaN where one is not finite."""
        x = x.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return Moments(len(x), x.mean(0), x.var(0))

    def merged(self, other: Moments) -> Moments:
        """Of the tokens of both (Chan et al. 1979, updating formulae for variances)."""
        number = self.number + other.number
        own, theirs = self.number / number, other.number / number
        apart = self.mean - other.mean
        variance = own * self.variance + theirs * other.variance + own * theirs * apart**2
        return Moments(number, own * self.mean + theirs * other.mean, variance)


@dataclass(frozen=True, eq=False)
class Rescale:
    """y * ``scale`` + ``bias``, both float64 (D)."""

    scale: np.ndarray
    bias: np.ndarray


def rescale(wanted: Moments, found: Moments) -> Rescale:
    """What gives outputs of ``found`` the moments ``wanted``; where they do not vary, their mean alone."""
    varies = found.variance >= SMALLEST
    ratio = wanted.variance / np.where(varies, found.variance, 1.0)
    scale = np.where(varies, np.sqrt(ratio), 1.0)
    return Rescale(scale, wanted.mean - found.mean * scale)
