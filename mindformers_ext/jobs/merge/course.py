# SPDX-License-Identifier: Apache-2.0
"""The course of every merge once its plan stands: room on the disk, weights in one pass, files beside, whole or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.formats.atomic import fresh_folder
from mindformers_ext.formats.disk import check_space, free_bytes, refusal
from mindformers_ext.formats.tensors import Array, TensorInfo
from mindformers_ext.jobs.merge.likeness import write_likeness
from mindformers_ext.jobs.merge.output import (
    MergeReport,
    OutputRequest,
    chain_mindspore,
    write_weights,
)
from mindformers_ext.jobs.merge.plan import TensorTask, parameters_of
from mindformers_ext.jobs.merge.stream import Findings, TaskRunner


@dataclass(frozen=True)
class Prepared:
    """A merge that is open and checked. ``start`` gives the blocks of each tensor, by its place in ``infos``.

    ``beside`` writes what lies beside the weights and returns notes; ``comparison`` opens the tensors to compare.
    """

    infos: Sequence[TensorInfo]
    lines: tuple[str, ...]
    notes: Sequence[str]
    start: Callable[[Findings, list[str]], Callable[[int], Iterator[Array]]]
    beside: Callable[[Path], list[str]]
    comparison: Callable[[], tuple[TaskRunner, Sequence[TensorTask]]]


def run_merge(
    out: OutputRequest, opening: AbstractContextManager[Prepared], findings: Findings, write: bool
) -> MergeReport:
    """Run the merge that ``opening`` prepares, or with ``write`` false only say what it would do.

    ``findings`` says what is refused and takes down what came up.

    Raises:
        UserError: anything wrong with the configuration, the models or the output path; nothing is left half-written.
    """
    try:
        with opening as job:
            notes = write_likeness(out, *job.comparison()) if out.report else []
            seconds = None
            if write:
                check_space(out.folder, sum(info.nbytes for info in job.infos))
                started = time.monotonic()
                notes += _written(out, job, findings)
                seconds = time.monotonic() - started
            return _report(out, job, seconds, notes)
    except OSError as error:
        raise refusal(error, f"read a model or to write '{out.folder}'") from error


def _written(out: OutputRequest, job: Prepared, findings: Findings) -> list[str]:
    notes: list[str] = []
    blocks = job.start(findings, notes)
    with fresh_folder(out.folder, out.overwrite) as partial:
        write_weights(partial, job.infos, out, blocks)
        notes += job.beside(partial)
    return [*notes, *findings.notes(), *chain_mindspore(out)]


def _report(out: OutputRequest, job: Prepared, seconds: float | None, notes: Sequence[str]) -> MergeReport:
    infos = list(job.infos)
    return MergeReport(
        len(infos),
        parameters_of(infos),
        sum(info.nbytes for info in infos),
        free_bytes(out.folder),
        seconds,
        job.lines,
        (*job.notes, *notes),
    )
