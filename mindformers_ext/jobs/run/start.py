# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: the weights it loads, or the checkpoint of an earlier run that it continues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.jobs.checkpoint.saved import check_shapes, checkpoint_file, choose_resume, fault, remove_leftovers
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.slices import settle_slices

SAFETENSORS = "safetensors"


def settle_for_mindformers(
    run: RunSpec, spec: NetworkSpec, known: bool = True
) -> tuple[RunSpec, list[str], TransformRequest | None]:
    """Check what MindFormers is to load and choose where to resume: the settled run, notes, and what to merge first.

    ``known``: whether ``spec`` tells the weights; those of another network of MindFormers' own it judges itself.

    Raises:
        UserError: nothing there, or what MindFormers cannot load or resume.
    """
    notes: list[str] = []
    if run.resume and run.trains:
        run, notes = _settle_resume(run)
    if not run.load:
        if not run.trains:
            notes.append("no load_checkpoint: the network keeps its random weights")
        return run, notes, None
    path = Path(run.load)
    if not path.exists():
        raise UserError(
            f"load_checkpoint {path} does not exist: give a .ckpt or .safetensors file, or a folder with rank_0 in it"
        )
    if path.is_dir() and (path / "config.json").is_file():
        raise UserError(
            f"load_checkpoint {path} is a Hugging Face folder: convert it first (python convert_weight.py "
            "--help) and give the result"
        )
    if not known:
        return run, notes, None
    run, found, merge = settle_slices(run, spec)
    notes += found
    if merge is None:
        run, found = _check_checkpoint(run, spec)
        notes += found
    return run, notes, merge


def settle_for_own_loop(run: RunSpec) -> tuple[RunSpec, list[str]]:
    """The same for our own loop, which judges weights itself, of more kinds."""
    if run.resume and run.trains:
        return _settle_resume(run, any_kind=True)
    return run, [] if run.load else ["no load_checkpoint: the network starts from random weights"]


def _settle_resume(run: RunSpec, any_kind: bool = False) -> tuple[RunSpec, list[str]]:
    folder = Path(run.load or Path(run.output_dir) / "checkpoint")
    suffix = run.suffix
    if any_kind and not rank_holds(folder, suffix) and rank_holds(folder, f".{SAFETENSORS}"):
        suffix = f".{SAFETENSORS}"
    if not run.load and not rank_holds(folder, suffix):
        left = remove_leftovers(folder)
        what = f" ({', '.join(path.name for path in left)} was half written)" if left else ""
        note = f"resume_training: {folder} holds no whole checkpoint yet{what}, the run starts from step 0"
        return replace(run, resume=False), [note]
    if suffix == f".{SAFETENSORS}" and not run.use_parallel and not any_kind:
        raise UserError(
            f"cannot resume from {folder}: MindFormers resumes one device from .ckpt only, load_ckpt_format is "
            "safetensors; save with checkpoint_format: ckpt, or start from the weights without --resume_training"
        )
    wanted, run = run.resume, replace(run, load=str(folder))
    if folder.is_file():
        reason = fault(folder)
        if reason:
            raise UserError(f"cannot resume from {folder}: {reason}")
        return run, [f"resuming from {folder}"]
    point = choose_resume(folder, wanted if isinstance(wanted, str) else None, suffix)
    remove_leftovers(folder)
    return replace(run, resume=point.saved.path.name), [
        *(f"passed over: {reason}" for reason in point.passed_over),
        f"resuming from {point.saved.path}, the newest whole checkpoint (epoch {point.saved.epoch}, step "
        f"{point.saved.step} of it)",
    ]


def rank_holds(folder: Path, suffix: str) -> bool:
    """Whether a rank folder below ``folder`` holds a file that ends in ``suffix``."""
    ranks = rank_folders(folder).values() if folder.is_dir() else ()
    return any(path for rank in ranks for path in rank.glob(f"*{suffix}"))


def _check_checkpoint(run: RunSpec, spec: NetworkSpec) -> tuple[RunSpec, list[str]]:
    """Shapes of a whole checkpoint; a sliced one can only be judged with its strategy."""
    path = Path(run.load or "")
    if path.is_dir() and isinstance(run.resume, str):
        file: Path | None = path / "rank_0" / run.resume
    else:
        file = checkpoint_file(path, run.suffix)
    if file is None:
        raise UserError(
            f"load_checkpoint {path} holds no {run.suffix} file: give a checkpoint file, or a folder with rank_0 in it "
            "(load_ckpt_format chooses .ckpt or .safetensors)"
        )
    if path.is_dir() and len(rank_folders(path)) > 1 or run.auto_transform:
        return run, []
    check_shapes(file, spec.model)
    if file.suffix != f".{SAFETENSORS}":
        return run, []
    notes = []
    if run.load_format != SAFETENSORS:
        run = replace(run, load_format=SAFETENSORS)
        notes.append("load_ckpt_format becomes safetensors, the kind of load_checkpoint")
    if not run.use_parallel and file.parent.name.startswith("rank_"):
        run = replace(run, load=str(_outside_rank_folder(file, Path(run.output_dir))))
    return run, notes


def _outside_rank_folder(file: Path, output_dir: Path) -> Path:
    """A link to ``file``: MindFormers takes safetensors in a folder rank_0 for one slice of several and refuses it."""
    link = output_dir / "loaded" / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(file.resolve())
    return link
