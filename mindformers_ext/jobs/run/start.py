# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: the weights it loads, or the checkpoint of an earlier run that it continues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mindformers_ext.core.cluster.build import BuildSpec
from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.jobs.checkpoint.saved import check_shapes, checkpoint_file
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.resume import settle_resume
from mindformers_ext.jobs.run.slices import settle_slices

SAFETENSORS = "safetensors"


def settle_for_mindformers(
    run: RunSpec, build: BuildSpec, known: bool = True
) -> tuple[RunSpec, list[str], TransformRequest | None]:
    """Check what MindFormers is to load and choose where to resume: the settled run, notes, and what to merge first.

    ``known``: whether ``build`` tells the weights; those of another network of MindFormers' own it judges itself.

    Raises:
        UserError: nothing there, or what MindFormers cannot load or resume.
    """
    notes: list[str] = []
    if run.resume and run.trains:
        run, notes, merge = settle_resume(run, build if known else None)
        if run.base and merge is None:
            _check_path(Path(run.base))
            below, found, merge = settle_slices(replace(run, load=run.base, resume=False), build.network)
            run, notes = replace(run, base=below.load, auto_transform=False), [*notes, *found]
        if run.resume and known:
            return run, notes, merge
    if not run.load:
        if not run.trains:
            notes.append("no load_checkpoint: the network keeps its random weights")
        return run, notes, None
    _check_path(Path(run.load))
    if not known:
        return run, notes, None
    run, found, merge = settle_slices(run, build.network)
    notes += found
    if merge is None:
        run, found = _check_checkpoint(run, build.network)
        notes += found
    return run, notes, merge


def _check_path(path: Path) -> None:
    """What MindFormers loads is there, and of its kind."""
    if not path.exists():
        raise UserError(
            f"load_checkpoint {path} does not exist: give a .ckpt or .safetensors file, or a folder with rank_0 in it"
        )
    if path.is_dir() and (path / "config.json").is_file():
        raise UserError(
            f"load_checkpoint {path} is a Hugging Face folder: convert it first (python convert_weight.py "
            "--help) and give the result"
        )


def settle_for_own_loop(run: RunSpec, build: BuildSpec) -> tuple[RunSpec, list[str]]:
    """The same for our own loop, which judges weights itself, of more kinds."""
    if run.resume and run.trains:
        return settle_resume(run, build, own_loop=True)[:2]
    return run, [] if run.load else ["no load_checkpoint: the network starts from random weights"]


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
