# SPDX-License-Identifier: Apache-2.0
"""The largest micro batch and the least recompute with which a split fits its devices.

Both cost memory, and what one takes the other lacks: the answer is a Pareto front, the choices that no other one beats
in both. Recompute is cut as finely as the YAML can say it: nothing, parts of every layer, so many layers of each stage.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mindformers_ext.core.cluster.memory import StageMemory, StepSettings, stage_activations, stage_memory, worst_load
from mindformers_ext.core.cluster.split_cost import repeated_share
from mindformers_ext.core.cluster.split_search import is_valid
from mindformers_ext.core.config.recompute import RecomputeSpec
from mindformers_ext.core.spec import NetworkSpec

MOST = 2**16  # sequences of a micro batch: larger ones are not looked for


@dataclass(frozen=True)
class BatchPoint:
    """One micro batch (``spec.batch_size``) and the least recompute (``settings``) with which it fits.

    ``memory``: the fullest stage, its experts equally loaded; ``worst``: at the worst load. ``repeated``: more products
    that the busiest stage computes for recompute (``split_cost.repeated_share``).
    """

    spec: NetworkSpec
    settings: StepSettings
    memory: StageMemory
    worst: StageMemory
    repeated: float

    @property
    def recomputed(self) -> tuple[float, int, int]:
        """How much is computed again, to be compared: products, whole layers, kinds of parts."""
        recompute = self.settings.recompute
        return self.repeated, len(recompute.layers), len(recompute.selected)


@dataclass(frozen=True)
class BatchFront:
    """``points``: the front, the smallest micro batch first; none where not one sequence fits. ``largest``: the largest
    that fits; ``by_rule``: a rule refuses the next one, which else needs too much memory."""

    points: tuple[BatchPoint, ...]
    largest: int
    by_rule: bool


def batch_front(
    spec: NetworkSpec, settings: StepSettings, limit: int, parts: frozenset[str] = frozenset()
) -> BatchFront:
    """The front of the split of ``spec``; micro batches are powers of two, that of ``spec`` and the largest one.

    Args:
        spec: as ``effective_spec`` leaves it, without a broken rule but perhaps for its ``batch_size``.
        settings: of its step; their recompute says what is repeated and kept of a layer, not of which.
        limit: bytes of one device, which equally loaded experts keep to.
        parts: of ``config.recompute.PARTS``, which may be computed again of layers that are not so as a whole.
    """
    search = _Search(spec, settings, limit, parts)
    largest = search.largest()
    sizes = {2**power for power in range(largest.bit_length())} | {largest, min(spec.batch_size, largest)}
    front: list[BatchPoint] = []
    for batch in sorted(sizes - {0}, reverse=True):
        point = search.point(batch)
        if point and (not front or point.recomputed < front[-1].recomputed):
            front.append(point)
    return BatchFront(tuple(reversed(front)), largest, not is_valid(replace(spec, batch_size=largest + 1)))


class _Search:
    """The points of one split."""

    def __init__(self, spec: NetworkSpec, settings: StepSettings, limit: int, parts: frozenset[str]) -> None:
        self.spec, self.settings = spec, settings
        # what neither micro batch nor recompute changes: weights, gradients, optimizer states, gathered weights
        self.rooms = [limit - (stage.total - stage.activations) for stage in stage_memory(spec, settings)]
        layers = range(spec.model.num_hidden_layers)
        self.stages = [[layer for layer in layers if spec.layer_stage(layer) == s] for s in range(len(self.rooms))]
        every = frozenset(layers)
        selected = tuple((part, every) for part in sorted(parts))
        nothing = replace(settings.recompute, layers=frozenset())
        self.ways = [replace(nothing, selected=chosen) for chosen in dict.fromkeys(((), selected))]

    def largest(self) -> int:
        """The largest micro batch that fits; 0: none."""
        over = 1
        while over <= MOST and self.fits(over):
            over *= 2
        return bisect_left(range(1, min(over, MOST + 1)), True, over // 2, key=lambda batch: not self.fits(batch))

    def fits(self, batch: int) -> bool:
        """Whether a micro batch breaks no rule and some recompute makes it fit."""
        return is_valid(replace(self.spec, batch_size=batch)) and any(
            all(self._has_room(batch, way, own, 0) or self._has_room(batch, way, own, len(own)) for own in self.stages)
            for way in self.ways
        )

    def point(self, batch: int) -> BatchPoint | None:
        """The least recompute of one micro batch."""
        spec = replace(self.spec, batch_size=batch)
        found = [  # the share is that of one micro batch for all, which slots rounded up would else tell apart
            BatchPoint(
                spec, step, _fullest(spec, step), _fullest(worst_load(spec), step), repeated_share(self.spec, step)
            )
            for step in self._choices(batch)
        ]
        return min(found, key=lambda point: point.recomputed, default=None)

    def _choices(self, batch: int) -> Iterator[StepSettings]:
        """With parts and without, the fewest layers of each stage with which a micro batch fits."""
        for way in self.ways:
            chosen = [self._fewest(batch, way, own) for own in self.stages]
            layers = [layer for some in chosen for layer in some or ()]
            if None not in chosen:
                yield replace(self.settings, recompute=replace(way, layers=frozenset(layers)))

    def _fewest(self, batch: int, way: RecomputeSpec, own: Sequence[int]) -> Sequence[int] | None:
        """Of a stage's layers the first ones that leave it in its room, None where all do not. The first layer that is
        computed again needs memory for it, every further one saves some."""
        if self._has_room(batch, way, own, 0):
            return ()
        if not self._has_room(batch, way, own, len(own)):
            return None
        counts = range(1, len(own))
        return own[: 1 + bisect_left(counts, True, key=lambda count: self._has_room(batch, way, own, count))]

    def _has_room(self, batch: int, way: RecomputeSpec, own: Sequence[int], count: int) -> bool:
        """Whether the stage of the layers ``own`` fits when so many of its first are computed again."""
        stage = self.spec.layer_stage(own[0])
        step = replace(self.settings, recompute=replace(way, layers=frozenset(own[:count])))
        return stage_activations(replace(self.spec, batch_size=batch), step, stage) <= self.rooms[stage]


def _fullest(spec: NetworkSpec, settings: StepSettings) -> StageMemory:
    return max(stage_memory(spec, settings), key=lambda stage: stage.total)
