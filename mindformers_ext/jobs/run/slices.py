# SPDX-License-Identifier: Apache-2.0
"""Weights saved by several ranks, for a run whose every device holds the whole network (one device, data parallel).

MindFormers' ``auto_trans_ckpt`` transforms to the strategy that semi-auto parallel compiles, and stops in the other
modes, which have none. Here slices are merged by their strategy files, copies of data-parallel ranks are recognised,
and every rank loads the one whole file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.rank_dirs import checkpoint_files, rank_folders
from mindformers_ext.jobs.checkpoint.saved import check_shapes, checkpoint_file, holds_whole
from mindformers_ext.jobs.checkpoint.transform import LAST, TransformRequest, transform

FOLDER = "transformed_checkpoint"  # below output_dir, as MindFormers


def settle_slices(config: dict[str, Any], spec: NetworkSpec, suffix: str) -> tuple[list[str], TransformRequest | None]:
    """Decide what every rank loads: notes, and what must be merged first (None: nothing). Changes ``config``.

    Leaves alone what semi-auto parallel loads: MindFormers cuts that by the strategy it has compiled.

    Raises:
        UserError: slices without their strategy files, or a resume from slices.
    """
    parallel, path = spec.parallel, Path(config["load_checkpoint"])
    cuts = config.get("use_parallel") and parallel.parallel_mode in SHARDED_MODES
    if cuts or (config.get("resume_training") and not config.get("auto_trans_ckpt")):
        return [], None
    ranks = rank_folders(path) if path.is_dir() else {}
    asked = bool(config.get("auto_trans_ckpt"))
    config["auto_trans_ckpt"] = False
    file = checkpoint_file(path, suffix)
    if len(ranks) > 1 and file is not None and not holds_whole(file, spec.model):
        return _merge(config, path, len(ranks), asked)
    notes = [f"auto_trans_ckpt: {path} holds whole weights, which every device loads: nothing is transformed"] * asked
    missing = [rank for rank in range(parallel.device_num) if ranks and rank not in ranks]
    if file is not None and missing and config.get("use_parallel") and not config.get("resume_training"):
        config["load_checkpoint"] = str(file)
        notes.append(f"{path} was saved by {len(ranks)} processes, this run has {parallel.device_num}: all load {file}")
    return notes, None


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


def _merge(config: dict[str, Any], path: Path, ranks: int, asked: bool) -> tuple[list[str], TransformRequest]:
    if config.get("resume_training"):
        raise UserError(
            f"cannot resume from {path}, which holds the slices of {ranks} ranks: resume with the devices "
            "that saved it, or merge it (tools/transform_ckpt.py) and start from its weights"
        )
    strategies = config.get("src_strategy_path_or_dir")
    if not asked or not strategies:
        raise UserError(
            f"load_checkpoint {path} holds the slices of {ranks} ranks, and every device of this run holds the whole "
            "network: set auto_trans_ckpt: True and src_strategy_path_or_dir to the folder output/strategy of the run "
            "that saved it, or merge it before (python tools/transform_ckpt.py --help)"
        )
    request = TransformRequest(
        src_ckpt_dir=path,
        dst_ckpt_dir=Path(config["output_dir"]) / FOLDER / path.name,
        src_strategy=Path(strategies),
        pick=LAST if any(len(checkpoint_files(folder)) > 1 for folder in rank_folders(path).values()) else None,
        output_format="ckpt",
        unlisted="copy",
        overwrite=True,
    )
    config["load_checkpoint"], config["load_ckpt_format"] = str(merged_file(request)), "ckpt"
    return [f"auto_trans_ckpt: the slices of {ranks} ranks in {path} are merged to {merged_file(request)}"], request
