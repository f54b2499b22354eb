# SPDX-License-Identifier: Apache-2.0
"""The stage ``split``: everything is checked, what is finished is kept, the rest is solved layer by layer and written.

Layers are independent: they are solved here, in several processes, or by the machines of a Ray cluster; only this
process writes the split's files.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mindformers_ext.core.errors import UserError, listed
from mindformers_ext.formats.disk import check_space
from mindformers_ext.formats.folder_lock import locked
from mindformers_ext.jobs.experts.dense_model import DenseModel, open_dense, template_kind
from mindformers_ext.jobs.experts.layer_pool import Solved, solve_layers
from mindformers_ext.jobs.experts.overlap_files import write_overlap
from mindformers_ext.jobs.experts.split_methods import Method, SplitRequest, check_words
from mindformers_ext.jobs.experts.splits import META, layer_file, open_split, read_meta, split_sha, write_split
from mindformers_ext.jobs.items.ray_cluster import check_ray

COPIES = 3  # of a layer's matrix as float32 that solving one layer holds
GRAPH_COPIES = 5  # of the graph's
LEAST_LAYERS = 2  # a process more is started for so many layers: it takes a second


@dataclass(frozen=True)
class SplitPlan:
    """A split that is checked. kept: layers that are finished. workers: processes. layer_bytes: what one layer needs
    in memory. disk_bytes: what all that are left leave on the disk at most."""

    folder: Path
    settings: Mapping[str, Any]
    marks: Mapping[int, str]
    todo: tuple[int, ...]
    kept: tuple[int, ...]
    workers: int
    layer_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class SplitReport:
    """What was done. about: per solved layer its figures."""

    plan: SplitPlan
    about: Mapping[int, Mapping[str, Any]]
    seconds: float


def plan_split(request: SplitRequest) -> SplitPlan:
    """Check the request and every layer's input; nothing is written.

    Raises:
        UserError: anything wrong with the options, the model, the inputs, or a split that stands there already.
    """
    method = check_words(request)
    if request.ray is not None:
        check_ray(request.ray)
    model = open_dense(request.model_path)
    try:
        layers = model.check_layers(request.layers)
        settings = method.settings(request, model)
        folder = request.save_path / method.folder(request, model)
        check_place(folder)
        marks = {layer: method.mark(request, model, layer) for layer in layers}
        kept = () if request.overwrite else _finished(folder, request, settings, marks)
        todo = tuple(layer for layer in layers if layer not in kept)
        nbytes = _layer_bytes(method, request, model)
        disk = len(todo) * method.disk(model.spec.intermediate_size)
        check_space(folder, disk, inside=True)
        return SplitPlan(
            folder, settings, marks, todo, kept, worker_count(request.workers, len(todo), nbytes), nbytes, disk
        )
    finally:
        model.close()


def split_folder(request: SplitRequest) -> Path:
    """Where the split of this request lies; the options are checked, no weight is read.

    Raises:
        UserError: options or a model that do not fit.
    """
    method = check_words(request)
    model = open_dense(request.model_path)
    try:
        return request.save_path / method.folder(request, model)
    finally:
        model.close()


def run_split(request: SplitRequest, plan: SplitPlan, quiet: bool = False) -> SplitReport:
    """Solve and write the layers of ``plan``."""
    from tqdm import tqdm

    started = time.monotonic()
    about: dict[int, Mapping[str, Any]] = {}
    if request.overwrite:
        _clear(plan.folder, request.template, plan.settings)
    plan.folder.mkdir(parents=True, exist_ok=True)
    hidden = quiet or not plan.todo
    bar = tqdm(total=len(plan.todo), unit="layer", desc="splitting", disable=hidden, dynamic_ncols=True)
    with bar, closing(solved(request, plan)) as found:  # processes end with it, however it ends
        for layer, split, figures in found:
            about[layer] = figures
            entry = {"input_sha256": plan.marks[layer], **figures}
            write_split(plan.folder, request.template, layer, split, plan.settings, entry)
            bar.update()
    if request.visualization_path is not None:
        layers = sorted(plan.marks)
        splits = {layer: open_split(plan.folder, request.template, layer) for layer in layers}
        write_overlap(request.visualization_path, splits)
    return SplitReport(plan, dict(sorted(about.items())), time.monotonic() - started)


def solved(request: SplitRequest, plan: SplitPlan) -> Generator[Solved, None, None]:
    """(layer, split, figures) of each layer to do, as they are finished."""
    return solve_layers(request, plan.todo, plan.workers)


def check_place(folder: Path) -> None:
    """``folder`` can be made and written, as far as this can be known before."""
    standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not standing.is_dir():
        raise UserError(f"'{standing}' is a file, so '{folder}' cannot be made: choose another --save_path")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UserError(f"'{standing}' cannot be written: choose another --save_path, or change its permissions")


def worker_count(asked: int | None, layers: int, nbytes: int) -> int:
    """Processes for ``layers`` layers that need ``nbytes`` of memory each."""
    if asked is not None and asked < -1:
        raise UserError(f"--workers {asked} is below -1: give how many processes, or -1 for as many as fit")
    most = len(os.sched_getaffinity(0)) if asked in (None, 0, -1) else int(asked or 1)
    if asked in (None, 0, -1):
        most = min(most, max(1, int(0.8 * psutil.virtual_memory().available / max(nbytes, 1))))
        most = min(most, math.ceil(layers / LEAST_LAYERS))
    return max(1, min(most, layers))


def _layer_bytes(method: Method, request: SplitRequest, model: DenseModel) -> int:
    width, hidden = model.spec.intermediate_size, model.spec.hidden_size
    if "hidden_features_path" in method.own:
        return GRAPH_COPIES * 4 * width * width
    return COPIES * 4 * width * hidden if "starts" in method.own else 0


def _finished(
    folder: Path, request: SplitRequest, settings: Mapping[str, Any], marks: Mapping[int, str]
) -> tuple[int, ...]:
    """The layers that stand in ``folder`` as this request would make them.

    Raises:
        UserError: it holds anything else.
    """
    kind = template_kind(request.template)
    standing = [layer for layer in marks if layer_file(folder, request.template, layer).exists()]
    meta = read_meta(folder) if folder.is_dir() else {}
    advice = "choose another --save_path, or pass --overwrite to replace it"
    if not meta:
        others = sorted(path.name for path in folder.glob(f"layers.*.mlp.{kind}.weight")) if folder.is_dir() else []
        if others:
            raise UserError(f"'{folder}' holds {listed(others)} without {META}: {advice}")
        return ()
    differing = {
        name: (meta["settings"].get(name), settings.get(name))
        for name in sorted({*meta["settings"], *settings})
        if meta["settings"].get(name) != settings.get(name)
    }
    if differing:
        text = ", ".join(f"{name} {old!r} there, {new!r} here" for name, (old, new) in differing.items())
        raise UserError(f"'{folder}' holds a split that was made otherwise ({text}): {advice}")
    kept = []
    for layer in standing:
        entry = meta["layers"].get(str(layer))
        if not isinstance(entry, dict):  # a layer is entered before its file is written
            raise UserError(f"layer {layer} in '{folder}' is not in {META}, so split has not written it: {advice}")
        if entry.get("input_sha256") != marks[layer]:
            raise UserError(f"layer {layer} in '{folder}' was split from other inputs than these: {advice}")
        if entry.get("split_sha256") != split_sha(open_split(folder, request.template, layer)):
            raise UserError(f"layer {layer} in '{folder}' is not what split wrote: {advice}")
        kept.append(layer)
    return tuple(kept)


def _clear(folder: Path, template: str, settings: Mapping[str, Any]) -> None:
    """Take away the layers of a split that was made otherwise: they would stand beside the new ones."""
    if not folder.is_dir():
        return
    with locked(folder):
        try:
            same = read_meta(folder).get("settings") == settings
        except UserError:
            same = False
        if not same:
            before, _, behind = template.partition("{}")
            files: Sequence[Path] = [*folder.glob(f"{before}*{behind}"), folder / META]
            for path in files:
                if path.is_file():
                    path.unlink()
