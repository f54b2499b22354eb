# SPDX-License-Identifier: Apache-2.0
"""The three published LLaMA-MoE models as the paper and their config.json say them (LLaMA-MoE-v1, arXiv:2406.16554)."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Experts, chosen ones, neurons of an expert, score factor; weights in all and those that one token passes."""

    experts: int
    chosen: int
    size: int
    factor: float
    total: int
    active: int


PUBLISHED = {
    "3_5B-2_8": Published(8, 2, 1376, 4.0, 6_740_514_816, 3_494_123_520),
    "3_5B-4_16": Published(16, 4, 688, 4.0, 6_742_618_112, 3_496_226_816),
    "3_0B-2_16": Published(16, 2, 688, 8.0, 6_742_618_112, 2_955_161_600),
}
