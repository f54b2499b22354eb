# SPDX-License-Identifier: Apache-2.0
"""Training speeds that others have published, which ours are estimated from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A share of a device's peak that ``source`` has published (``mfu``) and the ``job`` that reached it; ``peak``:
    operations a second in 16 bits, taken for all of the device's kinds of NPU."""

    device: str
    peak: float
    mfu: float
    job: str
    source: str


DEVICE = "Atlas 900 A2"
# Devices with a published figure for a mixture of experts. This one: MindSpeed-LLM at 7e8c5fe0.
ANCHORS = (Anchor(DEVICE, 313e12, 0.317, "Mixtral-8x7B on 64 NPUs", "README of MindSpeed-LLM, 2026-03-14"),)
