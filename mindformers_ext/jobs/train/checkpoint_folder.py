# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of our own loop: the files of MindFormers' monitor, with the same names and tensors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.train import CheckpointSchedule
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.formats.dtypes import float_dtype
from mindformers_ext.formats.ms_ckpt import CkptWriter
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.safetensors_file import SafetensorsFileWriter
from mindformers_ext.formats.tensors import Reader, TensorInfo
from mindformers_ext.jobs.checkpoint.saved import note_size, saved_as, saved_in
from mindformers_ext.jobs.run.keep import WEIGHTS, is_finite, last_good, surplus
from mindformers_ext.jobs.run.mixture_checks import held_state
from mindformers_ext.jobs.train.hooks import PREFIX
from mindformers_ext.weights.reshard import open_sliced

TRAINED = ("adam_m.", "adam_v.")  # moments
COUNTERS = ("scale_sense", "global_step", "current_iterator_step", "last_overflow_iterator_step")
State = Iterable[tuple[str, np.ndarray]]


class CheckpointFolder:
    """``<output_dir>/checkpoint/rank_0``: writes whole files or none, and removes old ones once a later step was good.

    Args:
        output_dir: the run's folder.
        plan: prefix, kind of file and how many stay.
        per_epoch: steps of one pass over the data, for the names.
    """

    def __init__(self, output_dir: Path, plan: CheckpointSchedule, per_epoch: int) -> None:
        self.folder = output_dir / "checkpoint" / "rank_0"
        self.plan, self.per_epoch = plan, per_epoch
        self.pending: Path | None = None  # written last, and not yet followed by a step that shows it is good
        self.run = max((saved.run for saved in saved_in(self.folder, plan.suffix)), default=0)

    def due(self, step: int, last: int) -> bool:
        """Whether a checkpoint belongs behind ``step`` (from 1) of ``last``."""
        return step == last or bool(self.plan.steps and step % self.plan.steps == 0)

    def write(self, step: int, state: State, more: Mapping[str, np.ndarray]) -> Path:
        """Write ``state`` and ``more`` as the checkpoint of ``step``.

        Raises:
            UserError: a weight is not finite; nothing is written.
        """
        started = time.time()
        epoch, place = (step - 1) // self.per_epoch + 1, (step - 1) % self.per_epoch + 1
        run = f"_{self.run}" if self.run else ""
        path = self.folder / f"{self.plan.prefix}_rank_0{run}-{epoch}_{place}{self.plan.suffix}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with fresh_file(path, overwrite=True) as beside:
            _write(beside, path.suffix, _checked(chain(state, more.items()), step, self))
        note_size(path)
        self.pending = path
        get_logger(__name__).info("Checkpoint of step %d: %s (%.1f s)", step, path, time.time() - started)
        return path

    def prune(self) -> None:
        """A step was good: remove the oldest files above the plan's number, never the newest."""
        if self.pending is None:
            return
        newest, self.pending = self.pending, None
        for path in surplus((saved.path for saved in saved_in(self.folder, self.plan.suffix)), self.plan.keep, newest):
            path.unlink()


def _checked(state: State, step: int, folder: CheckpointFolder) -> Iterator[tuple[str, np.ndarray]]:
    """``state`` in numpy's types; ``UserError`` at a weight that is not finite."""
    for name, array in state:
        if array.dtype == np.uint16:  # an engine's bfloat16
            array = array.view(float_dtype("bf16"))
        if name.startswith(WEIGHTS) and not is_finite(array):
            raise UserError(
                f"step {step}: the weight {name} is not finite, nothing was saved and training stops. "
                f"{last_good(folder.folder, folder.plan.suffix)} Lower the learning rate or warm up longer."
            )
        yield name, array


def _write(path: Path, suffix: str, tensors: State) -> None:
    """A .ckpt takes one tensor at a time; a .safetensors file begins with all sizes, so they are held at once."""
    if suffix == ".ckpt":
        with CkptWriter(path) as ckpt:
            for name, array in tensors:
                ckpt.add(name, array)
        return
    held = list(tensors)
    infos = [TensorInfo(name, array.shape, array.dtype) for name, array in held]
    with SafetensorsFileWriter(path, infos, {"format": "np"}) as safe:
        for name, array in held:
            safe.add(name, array)


class Resumed:
    """An open checkpoint to continue from: ``weights`` one at a time, and ``state`` of moments and counters.

    Args:
        path: the first rank's file, which holds all.
        strategies: where it holds slices, the strategy files by which all ranks' are put together.
    """

    def __init__(self, path: Path, strategies: Path | None = None) -> None:
        saved = saved_as(path)
        self._reader: Reader = (
            open_sliced(path.parent.parent, strategies, saved.ending if saved else path.stem)
            if strategies
            else open_checkpoint(path)
        )
        self.path = path
        if "global_step" not in self._reader.infos:
            raise UserError(f"{path} holds no training state: start from its weights without --resume_training")

    @property
    def step(self) -> int:
        """Steps done, skipped ones included."""
        infos = self._reader.infos
        for name in ("step_num", "global_step"):
            if name in infos:
                return int(np.asarray(self._reader.read(name)).reshape(-1)[0])
        return 0

    @property
    def rows(self) -> int:
        """Rows of one of these steps, 0 where the checkpoint does not tell."""
        name = "global_batch_size"
        return int(np.asarray(self._reader.read(name)).reshape(-1)[0]) if name in self._reader.infos else 0

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Network tensors, one in memory at a time."""
        yield from ((name, self._reader.read(name)) for name in self._reader.infos if name.startswith(WEIGHTS))

    def state(self) -> dict[str, np.ndarray]:
        """Moments and counters."""
        names = [n for n in self._reader.infos if n.startswith(TRAINED) or n in COUNTERS]
        return {name: np.asarray(self._reader.read(name)) for name in names}

    def hooks(self) -> dict[str, np.ndarray]:
        """The own state of the run's hooks."""
        names = [name for name in self._reader.infos if name.startswith(PREFIX)]
        return {name: np.asarray(self._reader.read(name)) for name in names}

    def data(self) -> dict[str, np.ndarray]:
        """Where the run's rows stood."""
        return held_state(self._reader)

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()
