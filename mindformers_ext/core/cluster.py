# SPDX-License-Identifier: Apache-2.0
"""Which part of a network lies on which device."""

from __future__ import annotations


def layer_stage(layer: int, layers: int, stages: int) -> int:
    """The pipeline stage of a layer: equal numbers of neighbouring layers, one more on the first ``layers % stages``.

    The last stage also computes the output layer, so it is never the one with a layer more.
    """
    share, more = divmod(layers, stages)
    if layer < more * (share + 1):
        return layer // (share + 1)
    return more + (layer - more * (share + 1)) // share
