# SPDX-License-Identifier: Apache-2.0
"""The keys of the noise of gates that add it, handed to MindFormers' train step as one more column of every batch.

MindFormers reads the batch; the noise follows from the seed, the number of updates and the row (``core.philox``), so
that a resumed run goes on with the same. Without sink mode alone: a queue on the device is filled by the data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspore import Tensor

from mindformers_ext.core.families import Family
from mindformers_ext.core.philox import noise_keys
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec

NOISE = "noise_keys"  # the network's input, by name


@dataclass(frozen=True)
class StepNoise:
    """``share``: which of the equal parts of a batch this process reads."""

    seed: int
    share: int = 0

    def column(self, updates: int, rows: int) -> Tensor:
        """(rows, 3) int32 of the step behind ``updates``."""
        first = self.share * rows
        return Tensor(noise_keys(self.seed, updates, range(first, first + rows)))


class NoiseFed:
    """A train step that adds the keys to the columns it is called with, where it has some; before the step's cell."""

    noise: StepNoise | None = None
    optimizer: Any  # the step's

    def __call__(self, *columns: Tensor) -> Any:
        """One step."""
        if self.noise is not None:
            updates = int(self.optimizer.global_step.asnumpy()[0])
            columns = (*columns, self.noise.column(updates, columns[0].shape[0]))
        return super().__call__(*columns)  # type: ignore[misc]


def noise_of(spec: NetworkSpec, seed: int, rank: int) -> StepNoise | None:
    """What a network's gates need in this process; None: nothing."""
    if spec.noise_shape is None:
        return None
    return StepNoise(seed, _share(spec.parallel, rank))


def _share(parallel: ParallelSpec, rank: int) -> int:
    """The number of this process's part of a batch; 0 where each reads the whole."""
    if parallel.parallel_mode in ("data_parallel", "hybrid_parallel"):  # full_batch means nothing there
        return rank
    if parallel.parallel_mode == "stand_alone" or parallel.full_batch:
        return 0
    return rank % (parallel.device_num // parallel.pipeline_stage) // parallel.model_parallel


def may_draw(family: Family, words: Mapping[str, Any]) -> bool:
    """Whether a network of ``family`` with these ``model_config`` words adds noise."""
    return any(word.field == "gate_add_noise" for word in family.words) and words.get("gate_add_noise") is not False
