# SPDX-License-Identifier: Apache-2.0
"""A data mixture whose proportions stay as they are, in MindFormers' loop; moving ones need our own.

What is drawn follows from the seed and the step's number, so a resumed run draws again, without reading, what was
drawn before it, and the state in its checkpoints is that of our loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore.dataset as ds
import numpy as np
from mindspore.train import Callback

from mindformers_ext.core.config.mixture_words import MIXTURE, mixture_from_yaml
from mindformers_ext.core.errors import Problems
from mindformers_ext.data.mixture.state import MixtureState
from mindformers_ext.jobs.run.mixture import open_mixture
from mindformers_ext.jobs.run.mixture_checks import state_arrays
from mindformers_ext.jobs.train.domain_losses import drawn_figures
from mindformers_ext.jobs.train.mixture_data import MixtureData

SEED = "seed"  # our key in MindFormers' configuration of the loader: the seed of the draws
SOURCE = "batch_source"  # attribute of MindSpore's callback parameters: a ``MixtureTrack``


class MixtureRows:
    """This process's rows, one epoch after another; what MindSpore's ``GeneratorDataset`` iterates over.

    An iteration that is not carried to its end (MindSpore looks at a first row for its shapes) does not count.

    Args:
        data: the mixture, of the global batch.
        rank, size: of the processes that read parts of a batch.
    """

    def __init__(self, data: MixtureData, rank: int, size: int) -> None:
        self.data, self.begins = data, data.schedule.state
        each = data.rows // size
        self.each, self.part = each, slice(rank * each, (rank + 1) * each)

    def __len__(self) -> int:
        """Rows of a whole epoch."""
        return self.data.per_epoch * self.each

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        """The rows of an epoch, each as its columns. MindSpore counts them, so a resume in the middle gives the first
        row again and again for those that were there before, which MindSpore passes over."""
        schedule, per_epoch = self.data.schedule, self.data.per_epoch
        schedule.state = self.begins
        first = tuple(self.data.domains[0].row(0))
        for _ in range(self.begins.step % per_epoch * self.each):
            yield first
        for step in range(self.begins.step, (self.begins.step // per_epoch + 1) * per_epoch):
            yield from zip(*self.data.batch(step, self.part), strict=True)
        self.begins = schedule.state

    def go_to(self, step: int) -> None:
        """The next epoch is the one in which ``step`` (from 0) stands; steps before it are passed over."""
        self.data.schedule.state = self.begins
        self.data.schedule.pass_over(step)
        self.begins = self.data.schedule.state


class MixtureDataset:
    """MindFormers' loader of the type ``MixtureDataset``: gives MindSpore's data set of a mixture's rows."""

    def __new__(cls, **given: Any) -> ds.GeneratorDataset:
        """``given``: the words of the YAML, and MindFormers' own: shards, columns and rows of a batch."""
        theirs = ("num_shards", "shard_id", "python_multiprocessing", "num_parallel_workers", "column_names")
        shards, shard, *_, columns = (given.pop(name, None) for name in theirs)
        rows, seed, size = int(given.pop("batch_size")), int(given.pop(SEED, 0)), int(shards or 1)
        problems = Problems("train_dataset.data_loader")
        spec = mixture_from_yaml({**given, "type": MIXTURE}, "train_dataset.data_loader", problems)
        problems.raise_if_any()
        assert spec is not None
        data = MixtureData(open_mixture(spec), seed, rows * size, tuple(columns))
        source = MixtureRows(data, int(shard or 0), size)
        return ds.GeneratorDataset(source, list(columns), shuffle=False, num_parallel_workers=1)


def rows_below(dataset: ds.Dataset) -> MixtureRows | None:
    """The mixture that a MindSpore data set begins with, if any."""
    while dataset.children:
        dataset = dataset.children[0]
    source = getattr(dataset, "source", None)
    return source if isinstance(source, MixtureRows) else None


class MixtureTrack(Callback):
    """Where the mixture stands behind each step, which is not where MindSpore's pipeline has read to."""

    def __init__(self, rows: MixtureRows) -> None:
        super().__init__()
        data = rows.data
        self.schedule = type(data.schedule)(rows.begins, data.mixture.on_exhausted)

    def on_train_begin(self, run_context: Any) -> None:
        """Let the monitors find it."""
        run_context.original_args()[SOURCE] = self

    def behind(self, step: int) -> MixtureState:
        """The state when ``step`` (from 1) is done."""
        self.schedule.pass_over(step)
        return self.schedule.state

    def state(self, step: int) -> dict[str, np.ndarray]:
        """What a checkpoint of ``step`` holds of the mixture."""
        return state_arrays(self.behind(step))

    def figures(self, step: int) -> dict[str, float]:
        """What the record of ``step`` tells of it."""
        return drawn_figures(self.behind(step))
