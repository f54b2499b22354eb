# SPDX-License-Identifier: Apache-2.0
"""Which part of a network lies on which device."""

from __future__ import annotations


def layer_stage(layer: int, layers: int, stages: int, interleave: int = 1) -> int:
    """The pipeline stage of a layer: equal numbers of neighbouring layers, one more on the first ``layers % stages``.

    The last stage also computes the output layer, so it is never the one with a layer more. With ``interleave`` n
    (``pp_interleave_num``) the layers form stages * n such parts and every stage gets n of them, in turn (Narayanan et
    al. 2021, arXiv:2104.04473, section 2.2): of 8 layers, 2 stages and 2 parts each, layers 0, 1, 4, 5 are stage 0's.
    """
    share, more = divmod(layers, stages * interleave)
    if layer < more * (share + 1):
        part = layer // (share + 1)
    else:
        part = more + (layer - more * (share + 1)) // share
    return part % stages


def stage_messages(stage: int, stages: int, interleave: int = 1) -> int:
    """How often a stage of a pipeline sends rows to another one for a micro batch: forward behind each of its parts but
    the network's last, backward behind each but the network's first."""
    return 2 * interleave - (stage == 0) - (stage == stages - 1)


def open_parts(stage: int, stages: int, interleave: int, micro_batches: int) -> int:
    """How many of its parts' passes a stage keeps for their gradients at the peak of one forward, one backward.

    With one part each, the last stage keeps one micro batch and every stage before it one more. Interleaved, a stage
    starts with 2 * (stages - stage - 1) + (interleave - 1) * stages forward passes of a part, as Megatron-LM's schedule
    does (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
    """
    if interleave == 1:
        return min(stages - stage, micro_batches)
    ahead = 2 * (stages - stage - 1) + (interleave - 1) * stages
    return min(ahead + 1, micro_batches * interleave)
