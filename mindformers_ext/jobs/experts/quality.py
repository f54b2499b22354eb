# SPDX-License-Identifier: Apache-2.0
"""The ladder of one mixture on a text: dense, oracle, gate, static cut, random; see ``jobs.experts.ladder``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import scratch_folder
from mindformers_ext.jobs.experts.calibration import Calibration, opened
from mindformers_ext.jobs.experts.gating import Gating
from mindformers_ext.jobs.experts.ladder import (
    DENSE,
    GATE,
    ORACLE,
    POINTS,
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
from mindformers_ext.jobs.experts.probe import Course, Part, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import Share
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.surgery.experts.split import LayerSplit

LEAST_ROWS = 2  # one to measure neurons on, one to judge


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """``texts``: the first half of its rows says which neurons a static cut keeps, the other half judges all ways.
    ``beside``: the output; what enters the layers lies beside it while this runs."""

    texts: Calibration
    splits: Mapping[int, LayerSplit]
    gates: Gates | None
    gating: Gating
    beside: Path
    seed: int = 0

    @property
    def place(self) -> Path:
        """The folder that is there already and will hold the output, or a folder of it."""
        return next(folder for folder in self.beside.absolute().parents if folder.is_dir())


def check_quality(request: QualityRequest) -> None:
    """What can be known before anything is written.

    Raises:
        UserError: see ``measure``.
    """
    with opened(request.texts, Share()) as job:
        _halves(job.course, request)


def measure(request: QualityRequest) -> Ladder:
    """The losses.

    Raises:
        UserError: too little text, memory or disk, or whatever is wrong with model or text.
    """
    with opened(request.texts, Share()) as job:
        splits = request.splits
        first, second = _halves(job.course, request)
        with scratch_folder(request.place / request.beside.name) as place:
            counts = {layer: _kept(split, request.gating.chosen) for layer, split in splits.items()}
            masks = static_masks(_neuron_sums(first, place / "sums"), counts)
            return climb(second, _ways(request, masks), splits, place / "ways")


def _ways(request: QualityRequest, masks: Mapping[int, np.ndarray]) -> list[Way]:
    splits, experts, chosen = request.splits, len(request.splits[0].experts), request.gating.chosen
    return [
        Way(DENSE),
        Way(ORACLE, oracle(splits, chosen)),
        *([Way(GATE, gated(request.gates, request.gating))] if request.gates else []),
        Way(STATIC, fixed=masks),
        Way(RANDOM, at_random(experts, chosen, request.seed)),
    ]


@dataclass
class _Seen:
    """What a way holds beside a layer, as a sink tells it."""

    nbytes: int
    values: tuple[str, ...] = POINTS
    gradients: tuple[str, ...] = ()

    def take(self, layer: int, part: Part, values: object, gradients: object) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""


def _halves(course: Course, request: QualityRequest) -> tuple[Course, Course]:
    """The rows that measure neurons and those that judge, once there is room for them."""
    half = len(course.rows.ids) // 2
    if half < LEAST_ROWS // 2:
        raise UserError(
            f"the text gives {len(course.rows.ids)} rows of {course.length} tokens, {LEAST_ROWS} are needed: give "
            "a longer text or a smaller --block_size"
        )
    first, second = (_part(course, at) for at in (slice(0, half), slice(half, None)))
    spec, ways = course.model.spec, len(_ways(request, {}))
    tokens = max(course.tokens, course.length)
    seen = _Seen(4 * spec.intermediate_size * (spec.hidden_size + 2 * tokens))  # down, and weighed neurons
    wanted = needs(second, seen, spec.num_hidden_layers, backward=False, loss=True)
    check_needs(replace(wanted, disk=ways * wanted.disk), request.place)
    return first, second


def _part(course: Course, at: slice) -> Course:
    return replace(course, rows=course.rows.at(at))


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
