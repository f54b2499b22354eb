# SPDX-License-Identifier: Apache-2.0
"""A model folder from tasks: each reads once what several tensors are made of. Written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.disk import check_space, free_bytes, refusal
from mindformers_ext.formats.dtypes import BY_NUMPY, cast
from mindformers_ext.formats.safetensors_dir import SafetensorsDirWriter
from mindformers_ext.formats.tensors import Array, TensorInfo, TensorReader
from mindformers_ext.jobs.checkpoint.copy_tensors import bytes_bar
from mindformers_ext.jobs.merge.output import MergeReport, OutputRequest, chain_mindspore
from mindformers_ext.jobs.merge.threads import in_threads, thread_count

Tensors = Iterator[tuple[TensorInfo, Array]]
THREADS = 2  # each holds a dense matrix and one expert's part of it
BASE = 120 * 10**6  # bytes of a process that has imported no framework


@dataclass(frozen=True)
class Task:
    """Tensors written together because they are made of the same data; ``read`` makes them one after the other.
    ``nbytes``: what it holds at most."""

    infos: tuple[TensorInfo, ...]
    read: Callable[[], Tensors]
    nbytes: int


def as_written(info: TensorInfo, array: Array) -> Array:
    """``array`` in the type of ``info``; values that do not fit are a ``UserError``."""
    result, lost = cast(array, info.dtype)
    if lost:
        raise UserError(
            f"'{info.name}': {lost} values are beyond the range of {BY_NUMPY[info.dtype].long}: choose --dtype "
            "bfloat16 or float32"
        )
    return result


def copied(reader: TensorReader, info: TensorInfo) -> Task:
    """The tensor of the same name, in the type of ``info``."""

    def read() -> Tensors:
        yield info, as_written(info, reader.read(info.name))

    stored = reader.infos[info.name]
    return Task((info,), read, stored.nbytes + (info.nbytes if info.dtype != stored.dtype else 0))


def given(name: str, array: np.ndarray) -> Task:
    """A tensor that is there already."""
    info = TensorInfo(name, array.shape, array.dtype)

    def read() -> Tensors:
        yield info, array

    return Task((info,), read, array.nbytes)


def memory_note(tasks: Sequence[Task]) -> str:
    """What writing takes: as much as the largest tasks hold, one for each thread."""
    nbytes = BASE + sum(sorted((task.nbytes for task in tasks), reverse=True)[:THREADS])
    return f"writing takes about {nbytes / 1e9:.2f} GB of memory, for any number of layers"


def write_model(
    out: OutputRequest,
    tasks: Sequence[Task],
    beside: Callable[[Path], list[str]],
    notes: Sequence[str],
    write: bool,
) -> MergeReport:
    """Write all tensors and what ``beside`` adds to the folder; with ``write`` false only say what would be."""
    infos = [info for task in tasks for info in task.infos]
    nbytes = sum(info.nbytes for info in infos)
    seconds, said = None, [memory_note(tasks), *notes]
    try:
        if write:
            check_space(out.folder, nbytes)
            started = time.monotonic()
            with fresh_folder(out.folder, out.overwrite) as partial:
                _write(partial, infos, tasks, out)
                said += beside(partial)
            said += chain_mindspore(out)
            seconds = time.monotonic() - started
    except OSError as error:
        raise refusal(error, f"read a model or to write '{out.folder}'") from error
    parameters = sum(int(np.prod(info.shape, dtype=np.int64)) for info in infos)
    lines = tuple(f"{info.name} {BY_NUMPY[info.dtype].long} {list(info.shape)}" for info in infos)
    return MergeReport(len(infos), parameters, nbytes, free_bytes(out.folder), seconds, lines, tuple(said))


def _write(folder: Path, infos: Sequence[TensorInfo], tasks: Sequence[Task], out: OutputRequest) -> None:
    with (
        SafetensorsDirWriter(folder, infos, out.shard_bytes) as writer,
        bytes_bar(sum(info.nbytes for info in infos), "writing", out.quiet) as bar,
    ):

        def work(place: int, stop: Event) -> None:
            for info, array in tasks[place].read():
                if stop.is_set():
                    return
                writer.add_parts(info, iter([array]))
                with bar.get_lock():
                    bar.update(info.nbytes)

        in_threads(work, range(len(tasks)), min(THREADS, thread_count(out.threads)))
