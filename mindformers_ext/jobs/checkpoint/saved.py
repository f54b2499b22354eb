# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders of training runs: which files are whole, which one to resume from, and do they fit the network.

A folder is MindFormers': ``checkpoint/rank_<r>/<prefix>_rank_<r>[_<task>]-<epoch>_<step>.ckpt`` and ``meta.json``. A
file is written under another name, flushed and renamed, and its size is noted in ``sizes.json`` beside it; so a
half file can only come from a copy or a lost disk, and is still found here.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import JsonError, parse_json
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.atomic import flush, write_text
from mindformers_ext.formats.ms_ckpt import CkptFile
from mindformers_ext.formats.ms_file import CheckpointMeta, read_meta
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.formats.safetensors_file import SafetensorsFile
from mindformers_ext.weights.convert import rule_set
from mindformers_ext.weights.layouts import DENSE, Layout

SIZES = "sizes.json"
SUFFIXES = (".ckpt", ".safetensors")

_NAME = re.compile(
    r"(?P<prefix>.+)_rank_(?P<rank>\d{1,9})(?:_(?P<run>\d{1,9}))?-(?P<epoch>\d{1,18})_(?P<step>\d{1,18})", re.ASCII
)


@dataclass(frozen=True, order=True)
class Saved:
    """One checkpoint file; the step counts within its epoch, both from 1.

    ``run`` numbers the runs that wrote into one folder (MindFormers' ``_1`` behind the rank): a later run's files are
    newer than an earlier run's, whatever their step.
    """

    run: int
    epoch: int
    step: int
    path: Path

    @property
    def label(self) -> str:
        """``epoch_step``, as in the file name."""
        return f"{self.epoch}_{self.step}"

    @property
    def ending(self) -> str:
        """How the names of this step's files end, on all ranks."""
        return f"_{self.run}-{self.label}" if self.run else f"-{self.label}"


@dataclass(frozen=True)
class ResumePoint:
    """Where to resume: the folder above the rank folders, rank 0's file, and what was passed over and why."""

    folder: Path
    saved: Saved
    passed_over: tuple[str, ...]


def saved_in(folder: Path, suffix: str = ".ckpt") -> list[Saved]:
    """The checkpoint files of a rank folder, oldest first."""
    found = folder.glob(f"*{suffix}") if folder.is_dir() else ()
    return sorted(saved for path in found if (saved := saved_as(path)) is not None)


def saved_as(path: Path) -> Saved | None:
    """What the name of a checkpoint file tells; None for another file."""
    match = _NAME.fullmatch(path.stem)
    if match is None or path.suffix not in SUFFIXES:
        return None
    return Saved(int(match["run"] or 0), int(match["epoch"]), int(match["step"]), path)


def fault(path: Path) -> str | None:
    """Why ``path`` is not a whole checkpoint, or None when it is."""
    noted = noted_sizes(path.parent).get(path.name)
    size = path.stat().st_size
    if noted is not None and noted != size:
        return f"{path.name} has {size} bytes instead of {noted}"
    try:
        (SafetensorsFile if path.suffix == ".safetensors" else CkptFile)(path).close()
    except UserError as error:
        return str(error)
    return None


def last_whole(folder: Path, suffix: str = ".ckpt") -> Saved | None:
    """The newest whole checkpoint of a rank folder, or None."""
    return next((saved for saved in reversed(saved_in(folder, suffix)) if fault(saved.path) is None), None)


def choose_resume(folder: Path, name: str | None = None, suffix: str = ".ckpt") -> ResumePoint:
    """The newest step that every rank of ``folder`` has whole, or the file called ``name`` (rank 0's).

    Raises:
        UserError: the folder holds no rank folder, or no step is whole on every rank.
    """
    ranks = list(rank_folders(folder).values()) if folder.is_dir() else []
    if not ranks:
        raise UserError(
            f"nothing to resume from: {folder} has no folder rank_0; give --load_checkpoint the "
            "'checkpoint' folder of an earlier run"
        )
    passed_over = [
        f"{path.name} was being written when the run was stopped"
        for rank in ranks
        for path in sorted(rank.glob("*.tmp"))
    ]
    by_rank = [{(saved.run, saved.label): saved for saved in saved_in(rank, suffix)} for rank in ranks]
    for saved in reversed(saved_in(ranks[0], suffix)):
        if name and saved.path.name.removesuffix(suffix) != name.removesuffix(suffix):
            continue
        held = [found[saved.run, saved.label] for found in by_rank if (saved.run, saved.label) in found]
        reasons = [reason for reason in map(fault, (item.path for item in held)) if reason]
        if len(held) < len(ranks):
            reasons.append(f"step {saved.label} exists on {len(held)} of {len(ranks)} ranks")
        if not reasons:
            return ResumePoint(folder, saved, tuple(passed_over))
        passed_over += reasons
    tried = "; ".join(passed_over) or "there is no checkpoint file"
    raise UserError(
        f"nothing to resume from in {folder}: {tried}. Start without --resume_training, or give another "
        "--load_checkpoint"
    )


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the unfinished ``.tmp`` files of all rank folders; returns what was deleted."""
    ranks = rank_folders(folder).values() if folder.is_dir() else ()
    found = sorted(path for rank in ranks for path in rank.glob("*.tmp"))
    for path in found:
        path.unlink(missing_ok=True)  # the ranks of a job all look at once
    return found


def set_aside(folder: Path, first: tuple[int, int], since: float) -> list[Path]:
    """Rename the checkpoints from (epoch, step) ``first`` on to ``*.unusable``, so that nothing resumes from them.

    ``since``: files older than this time (seconds) belong to earlier runs and stay.
    """
    moved = []
    for saved in [item for suffix in SUFFIXES for item in saved_in(folder, suffix)]:
        if (saved.epoch, saved.step) >= first and saved.path.stat().st_mtime >= since:
            target = saved.path.with_name(saved.path.name + ".unusable")
            os.replace(saved.path, target)
            moved.append(target)
    return moved


def noted_sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes, as noted when each file was finished; empty where nothing was noted."""
    path = folder / SIZES
    try:
        noted = parse_json(path.read_bytes()) if path.is_file() else {}
    except JsonError:
        return {}
    return {name: size for name, size in noted.items() if type(size) is int} if isinstance(noted, dict) else {}


def note_size(path: Path) -> None:
    """Flush ``path`` to the disk and note its size; forgets files that are gone."""
    flush(path)
    folder = path.parent
    sizes = {name: size for name, size in noted_sizes(folder).items() if (folder / name).exists()}
    sizes[path.name] = path.stat().st_size
    write_text(folder / SIZES, json.dumps(sizes, indent=1))


def checkpoint_file(path: Path, suffix: str = ".ckpt") -> Path | None:
    """The file whose shapes tell what ``path`` holds: itself, a file in it, or rank 0's newest; None if none is."""
    if path.is_file():
        return path
    files = sorted(path.glob(f"*{suffix}"))
    if files:
        return files[0]
    newest = saved_in(path / "rank_0", suffix)
    return newest[-1].path if newest else next(iter(sorted((path / "rank_0").glob(f"*{suffix}"))), None)


def check_shapes(path: Path, model: ModelSpec, whole: bool = True) -> None:
    """Compare the weights in ``path`` with those ``model`` needs; reads no data.

    Args:
        path: a ``.ckpt`` or ``.safetensors`` file with MindFormers' names.
        model: the network's sizes.
        whole: every weight must be there; False for a file that holds one part.

    Raises:
        UserError: lists the names that are missing or have another shape.
    """
    reader = SafetensorsFile(path) if path.suffix == ".safetensors" else CkptFile(path)
    try:
        _check_layout(path, read_meta(path, reader))
        held = {name: info.shape for name, info in reader.infos.items()}
    finally:
        reader.close()
    needed = {name: shape for binding in rule_set(model).bindings for name, shape in binding.ms.items()}
    problems = Problems(f"checkpoint {path} does not fit the network of the configuration")
    wrong = [
        f"{name} is {held[name]}, the network has {shape}"
        for name, shape in needed.items()
        if name in held and held[name] != shape
    ]
    problems.add_names("weights", "of another shape", wrong, "correct the sizes in model.model_config and moe_config")
    if whole:
        missing = [name for name in needed if name not in held]
        problems.add_names(
            "weights", "missing", missing, "give the checkpoint of this model, converted to MindFormers' names"
        )
    extra = [
        name
        for name in held
        if name.startswith("model.layers.") and name not in needed and "router.router." not in name
    ]
    problems.add_names("weights", "that the network does not have", extra, "correct num_layers or moe_config")
    problems.raise_if_any()


def holds_whole(file: Path, model: ModelSpec) -> bool:
    """Whether a rank's file holds the whole network, as data-parallel ranks save it."""
    try:
        check_shapes(file, model)
    except UserError:
        return False
    return True


def _check_layout(path: Path, meta: CheckpointMeta | None) -> None:
    """The network reads the dense layout; another one may have the same shapes, so the description is asked."""
    if meta and (meta.layout != DENSE or meta.qkv_concat):
        raise UserError(
            f"checkpoint {path} lies {Layout(meta.layout, meta.qkv_concat)}, the network reads {DENSE}: bring it back "
            "with convert_weight.py --pre_ckpt_path X --mindspore_ckpt_path Y --use_gmm False"
        )
