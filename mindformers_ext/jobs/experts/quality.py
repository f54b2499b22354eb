# SPDX-License-Identifier: Apache-2.0
"""The ladder of one mixture on a text: dense, oracle, gate, static cut, random; see ``jobs.experts.ladder``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.experts.calibration import Calibration, opened
from mindformers_ext.jobs.experts.gating import Gating
from mindformers_ext.jobs.experts.ladder import (
    DENSE,
    GATE,
    ORACLE,
    RANDOM,
    STATIC,
    Gates,
    Ladder,
    NeuronSums,
    Way,
    at_random,
    climb,
    gated,
    oracle,
    static_masks,
)
from mindformers_ext.jobs.experts.probe import Course, Rows, forward
from mindformers_ext.jobs.experts.ranks import Share
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.surgery.experts.split import LayerSplit

LEAST_ROWS = 2  # one to measure neurons on, one to judge


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """``texts``: the first half of its rows says which neurons a static cut keeps, the other half judges all ways."""

    texts: Calibration
    splits: Mapping[int, LayerSplit]
    gates: Gates | None
    gating: Gating
    seed: int = 0


def measure(request: QualityRequest) -> Ladder:
    """The losses.

    Raises:
        UserError: too little text, or whatever is wrong with model or text.
    """
    with opened(request.texts, Share()) as job, tempfile.TemporaryDirectory(prefix="mfext_ladder_") as place:
        course, splits = job.course, request.splits
        half = len(course.rows.ids) // 2
        if half < LEAST_ROWS // 2:
            raise UserError(
                f"the text gives {len(course.rows.ids)} rows of {course.length} tokens, {LEAST_ROWS} are needed: give "
                "a longer text or a smaller --block_size"
            )
        first, second = (_part(course, at) for at in (slice(0, half), slice(half, None)))
        counts = {layer: _kept(split, request.gating.chosen) for layer, split in splits.items()}
        masks = static_masks(_neuron_sums(first, Path(place) / "sums"), counts)
        experts, chosen = len(splits[0].experts), request.gating.chosen
        ways = [
            Way(DENSE),
            Way(ORACLE, oracle(splits, chosen)),
            *([Way(GATE, gated(request.gates, request.gating))] if request.gates else []),
            Way(STATIC, fixed=masks),
            Way(RANDOM, at_random(experts, chosen, request.seed)),
        ]
        return climb(second, ways, splits, Path(place) / "ways")


def _part(course: Course, at: slice) -> Course:
    return replace(course, rows=Rows(course.rows.ids[at], course.rows.lengths[at]))


def _kept(split: LayerSplit, chosen: int) -> int:
    """Neurons that a token passes: the mean over the experts, for layers whose experts have different sizes."""
    return round(sum(split.sizes) * chosen / len(split.sizes)) + sum(split.residual_sizes)


def _neuron_sums(course: Course, folder: Path) -> Mapping[int, np.ndarray]:
    layers = range(course.model.spec.num_hidden_layers)
    sink = NeuronSums(lambda layer: np.linalg.norm(course.model.matrix("down_proj", layer), axis=0))
    states = States(folder, course.length, course.model.spec.hidden_size, "sums", False)
    try:
        forward(course, states, sink, layers)
    finally:
        states.remove()
    return sink.sums
