# SPDX-License-Identifier: Apache-2.0
"""Writes the files of target ranks, here or in several processes, with progress in bytes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.ms_ckpt import CkptFile, CkptWriter
from mindformers_ext.formats.ms_file import CheckpointMeta, open_checkpoint, open_writer, sidecar
from mindformers_ext.formats.safetensors_file import SafetensorsFile, SafetensorsFileWriter
from mindformers_ext.formats.strategy import Strategy
from mindformers_ext.formats.tensors import Array
from mindformers_ext.jobs.checkpoint.source import rank_meta
from mindformers_ext.jobs.items.processes import end_with_parent
from mindformers_ext.weights.boxes import pieces, read_box
from mindformers_ext.weights.reshard import SlicedReader
from mindformers_ext.weights.reshard_plan import RankPart

Count = Callable[[int], None]
SPARE_FILES = 64


@dataclass(frozen=True)
class RankFiles:
    """The file of every rank, and how they are cut; a strategy of None is one whole file."""

    files: Mapping[int, Path]
    strategy: Strategy | None


@dataclass(frozen=True)
class RankTask:
    """One target rank: its file and what goes into it."""

    rank: int
    path: Path
    parts: tuple[RankPart, ...]


def open_source(source: RankFiles, check_crc: bool = True) -> SlicedReader | CkptFile | SafetensorsFile:
    """A reader of the source's whole tensors. Files with a CRC are read once through unless ``check_crc`` is False."""
    _allow_open_files(len(source.files) + SPARE_FILES)
    with ExitStack() as stack:
        readers: dict[int, CkptFile | SafetensorsFile] = {}
        for rank, path in source.files.items():
            light = path.suffix == ".ckpt" and not check_crc
            readers[rank] = CkptFile(path) if light else open_checkpoint(path)
            stack.callback(readers[rank].close)
        result = SlicedReader(readers, source.strategy) if source.strategy else readers[0]
        stack.pop_all()
    return result


def _allow_open_files(needed: int) -> None:
    """Raise this process's limit on open files where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"{needed} files must be open at once, the system allows {hard}: raise 'ulimit -n'")


def run_tasks(source: RankFiles, tasks: Sequence[RankTask], processes: int, overwrite: bool) -> float:
    """Write every task's file; returns the seconds.

    Raises:
        UserError: a source file is damaged, the disk is full, or a process was killed.
    """
    from tqdm import tqdm

    total = sum(part.info.nbytes for task in tasks for part in task.parts)
    started = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="transforming", mininterval=0.5, dynamic_ncols=True) as bar:
        if processes > 1:
            _run_in_processes(source, tasks, processes, overwrite, bar.update)
        elif tasks:
            reader = open_source(source, check_crc=False)
            try:
                meta = rank_meta(source.files[0])
                for task in tasks:
                    write_rank(reader, task, meta, overwrite, bar.update)
            finally:
                reader.close()
    return time.monotonic() - started


def write_rank(
    reader: SlicedReader | CkptFile | SafetensorsFile,
    task: RankTask,
    meta: CheckpointMeta | None,
    overwrite: bool,
    count: Count,
) -> None:
    """Write one rank's file; it appears under its name when it is whole."""
    with fresh_file(task.path, overwrite) as partial:
        with _writer(partial, task, meta) as writer:
            for part in task.parts:
                writer.add_parts(part.info, _data(reader, part, count))
        if task.path.suffix == ".ckpt":
            _describe(task.path, partial, meta)


def _describe(path: Path, partial: Path, meta: CheckpointMeta | None) -> None:
    """The description lies beside before the file does: its fingerprint makes readers refuse an older file with it."""
    if meta is None:
        sidecar(path).unlink(missing_ok=True)
        return
    written = CkptFile(partial)
    try:
        mark = fingerprint(written)
    finally:
        written.close()
    with fresh_file(sidecar(path), overwrite=True) as beside:
        beside.write_text(replace(meta, hash=mark).to_text(), encoding="utf-8")


def _writer(partial: Path, task: RankTask, meta: CheckpointMeta | None) -> CkptWriter | SafetensorsFileWriter:
    targets = [part.info for part in task.parts]
    if meta is not None:
        return open_writer(partial, task.path.suffix, targets, replace(meta, hash=""))
    if task.path.suffix == ".ckpt":
        return CkptWriter(partial)
    return SafetensorsFileWriter(partial, targets, {"format": "ms"})


def _data(reader: SlicedReader | CkptFile | SafetensorsFile, part: RankPart, count: Count) -> Iterator[Array]:
    """The part's data in pieces; ``count`` is told the bytes of each."""
    for piece in pieces(part.box, part.info.dtype.itemsize):
        if isinstance(reader, SlicedReader):
            array = reader.read(part.info.name, piece)
        else:
            array = read_box(reader, part.info.name, piece)
        size = array.nbytes
        yield array
        del array  # or it lives on while the next one is made
        count(size)


# What a worker process holds between its tasks.
_worker: dict[str, Any] = {}


def _start_worker(source: RankFiles, overwrite: bool, queue: Any, parent: int) -> None:
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    reader = open_source(source, check_crc=False)
    _worker.update(reader=reader, meta=rank_meta(source.files[0]), overwrite=overwrite, queue=queue)


def _work(task: RankTask) -> None:
    write_rank(_worker["reader"], task, _worker["meta"], _worker["overwrite"], _worker["queue"].put)


def _run_in_processes(
    source: RankFiles, tasks: Sequence[RankTask], processes: int, overwrite: bool, count: Count
) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (source, overwrite, queue, os.getpid()))
    try:
        waiting: set[Future[None]] = {pool.submit(_work, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, timeout=0.3)
            _drain(queue, count)
            for future in done:
                future.result()
        _drain(queue, count)
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the transformation ended before its work was done, probably for want of memory: use a "
            "smaller --transform_process_num and run the same command again, which keeps the finished ranks"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _drain(queue: Any, count: Count) -> None:
    while True:
        try:
            count(queue.get_nowait())
        except Empty:
            return
