# SPDX-License-Identifier: Apache-2.0
"""Weights saved by several ranks, for a run whose every device holds the whole network (one device, data parallel).

MindFormers' ``auto_trans_ckpt`` transforms to the strategy that semi-auto parallel compiles, and stops in the other
modes, which have none. Here slices are merged by their strategy files, copies of data-parallel ranks are recognised,
and every rank loads the one whole file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.rank_dirs import checkpoint_files, rank_folders
from mindformers_ext.jobs.checkpoint.saved import check_shapes, checkpoint_file, holds_whole
from mindformers_ext.jobs.checkpoint.transform import LAST, TransformRequest, transform

FOLDER = "transformed_checkpoint"  # below output_dir, as MindFormers


def settle_slices(run: RunSpec, spec: NetworkSpec) -> tuple[RunSpec, list[str], TransformRequest | None]:
    """Decide what every rank loads of ``run.load``, weights of a new run: the run that does so, notes, and what must be
    merged first (None: nothing).

    Leaves alone what semi-auto parallel loads: MindFormers cuts that by the strategy it has compiled.

    Raises:
        UserError: slices without their strategy files.
    """
    assert run.load is not None
    parallel, path, asked = spec.parallel, Path(run.load), run.auto_transform
    if run.use_parallel and parallel.parallel_mode in SHARDED_MODES:
        return run, [], None
    ranks = rank_folders(path) if path.is_dir() else {}
    run = replace(run, auto_transform=False)
    file = checkpoint_file(path, run.suffix)
    if len(ranks) > 1 and file is not None and not holds_whole(file, spec.model):
        return _merge(run, path, len(ranks), asked)
    notes = [f"auto_trans_ckpt: {path} holds whole weights, which every device loads: nothing is transformed"] * asked
    missing = [rank for rank in range(parallel.device_num) if ranks and rank not in ranks]
    if file is not None and missing and run.use_parallel:
        run = replace(run, load=str(file))
        notes.append(f"{path} was saved by {len(ranks)} processes, this run has {parallel.device_num}: all load {file}")
    return run, notes, None


def merge_slices(request: TransformRequest, spec: NetworkSpec) -> Path:
    """Merge, by one process of the job; returns the file that all load.

    Raises:
        UserError: what ``transform`` refuses, or weights of another network.
    """
    transform(request)
    path = merged_file(request)
    check_shapes(path, spec.model)
    return path


def merged_file(request: TransformRequest) -> Path:
    """Where ``merge_slices`` puts its file."""
    return request.dst_ckpt_dir / "rank_0" / f"{request.prefix}0.{request.output_format}"


def merge_request(run: RunSpec, path: Path, pick: str | None) -> TransformRequest:
    """The slices in ``path``, of the files that ``pick`` names, as one file below the run's own folder."""
    return TransformRequest(
        src_ckpt_dir=path,
        dst_ckpt_dir=Path(run.output_dir) / FOLDER / path.name,
        src_strategy=run.strategies,
        pick=pick,
        output_format="ckpt",
        unlisted="copy",
        overwrite=True,
    )


def _merge(run: RunSpec, path: Path, ranks: int, asked: bool) -> tuple[RunSpec, list[str], TransformRequest]:
    if not asked or not run.strategies:
        raise UserError(
            f"load_checkpoint {path} holds the slices of {ranks} ranks, and every device of this run holds the whole "
            "network: set auto_trans_ckpt: True and src_strategy_path_or_dir to the folder output/strategy of the run "
            "that saved it, or merge it before (python tools/transform_ckpt.py --help)"
        )
    several = any(len(checkpoint_files(folder)) > 1 for folder in rank_folders(path).values())
    request = merge_request(run, path, LAST if several else None)
    run = replace(run, load=str(merged_file(request)), load_format="ckpt")
    return run, [f"auto_trans_ckpt: the slices of {ranks} ranks in {path} are merged to {run.load}"], request
