# SPDX-License-Identifier: Apache-2.0
"""Where a merge goes: checked before the work, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import refuse_existing
from mindformers_ext.formats.blocks import keep_pages
from mindformers_ext.formats.ms_file import check_suffix
from mindformers_ext.formats.safetensors_dir import CONFIG, SafetensorsDirWriter
from mindformers_ext.formats.tensors import Array, TensorInfo
from mindformers_ext.jobs.checkpoint.copy_tensors import bytes_bar, counted
from mindformers_ext.jobs.merge.threads import in_threads, thread_count, until


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """Where to write and how.

    ``to_mindspore``: a .ckpt made of the result, beside the folder. ``report``: a folder for a comparison of the
    inputs. ``threads`` None: as many as there are processors. ``download``: models named by the hub may be fetched.
    """

    folder: Path
    shard_bytes: int
    overwrite: bool = False
    copy_tokenizer: bool = True
    model_card: bool = True
    quiet: bool = False
    to_mindspore: Path | None = None
    report: Path | None = None
    threads: int | None = None
    download: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was written, or with ``seconds`` None what would be. ``lines`` has one line per tensor."""

    tensors: int
    parameters: int
    nbytes: int
    free: int
    seconds: float | None
    lines: tuple[str, ...]
    notes: tuple[str, ...]


def check_output(request: OutputRequest, sources: Iterable[Path]) -> None:
    """The output must be free to write and must not hold anything that is read."""
    out = request.folder
    if out.exists() and not out.is_dir():
        raise UserError(f"output '{out}' is a file: give a folder name")
    refuse_existing(out, request.overwrite)
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"output '{out}' holds '{source}', which is read: choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise UserError(f"output '{out}' is not a model folder: remove it yourself or choose another")
    if request.to_mindspore:
        check_suffix(request.to_mindspore)
        refuse_existing(request.to_mindspore, request.overwrite)
    if request.report:
        if request.report.resolve() == out.resolve():
            raise UserError(f"--report '{request.report}' is the output folder: choose another")
        refuse_existing(request.report, request.overwrite)


def check_result(request: OutputRequest, config: Mapping[str, Any]) -> None:
    """What is to become a MindSpore checkpoint must be a model that this package has."""
    if not request.to_mindspore:
        return
    try:
        model_spec_from_hf(config)
    except UserError as error:
        raise UserError(f"--to-mindspore cannot be done with this model: {error}") from error


def write_weights(
    folder: Path, infos: Sequence[TensorInfo], out: OutputRequest, blocks: Callable[[int], Iterator[Array]]
) -> None:
    """Write every tensor from its blocks (by place in ``infos``), with a progress bar of bytes; the largest first."""
    keep_pages()
    total = sum(info.nbytes for info in infos)
    with (
        SafetensorsDirWriter(folder, infos, out.shard_bytes) as writer,
        bytes_bar(total, "merging", out.quiet) as bar,
    ):

        def write(place: int, stop: Event) -> None:
            writer.add_parts(infos[place], counted(until(stop, blocks(place)), bar))

        order = sorted(range(len(infos)), key=lambda place: -infos[place].nbytes)
        in_threads(write, order, thread_count(out.threads))


def chain_mindspore(request: OutputRequest) -> list[str]:
    """Convert the finished folder where asked; returns notes."""
    if not request.to_mindspore:
        return []
    from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert

    report = convert(
        ConvertRequest(input_path=request.folder, output_path=request.to_mindspore, overwrite=request.overwrite)
    )
    return [*report.notes, f"{request.to_mindspore}: {report.tensors} tensors for MindSpore"]
