# SPDX-License-Identifier: Apache-2.0
"""Where a run continues: the checkpoint, and what must happen to it where another split has saved it.

Weights, the optimizer's moments and counters lie in the same slices, so they are put together alike. Rows of the data
need nothing: which ones a step takes follows from its number (``data.row_order``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mindformers_ext.core.cluster.build import BuildSpec
from mindformers_ext.core.cluster.placement import placed_parameters
from mindformers_ext.core.config.keys import SHARDED_MODES
from mindformers_ext.core.config.lora import LORA_A, LORA_B
from mindformers_ext.core.config.run import MINDSPORE, RunSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import put_link
from mindformers_ext.formats.ms_file import open_checkpoint
from mindformers_ext.formats.rank_dirs import rank_folders
from mindformers_ext.formats.safetensors_dir import CONFIG
from mindformers_ext.jobs.checkpoint.saved import (
    Saved,
    check_shapes,
    choose_resume,
    fault,
    last_whole,
    remove_leftovers,
    saved_as,
    saved_in,
)
from mindformers_ext.jobs.checkpoint.transform import TransformRequest
from mindformers_ext.jobs.run.adapters import settle_adapters
from mindformers_ext.jobs.run.keep import WEIGHTS
from mindformers_ext.jobs.run.slices import merge_request, merged_file

SAFETENSORS = ".safetensors"
RESUMED = "resumed"  # below output_dir: a link per rank to the file that all continue from
STRATEGY = "strategy"  # beside the folder ``checkpoint`` of a run
Settled = tuple[RunSpec, list[str], TransformRequest | None]


def settle_resume(run: RunSpec, build: BuildSpec | None, own_loop: bool = False) -> Settled:
    """The run that continues, notes, and what one process must merge first (None: nothing).

    Args:
        run: asks for a resume.
        build: the network's, None for one of MindFormers' own, which it judges itself.
        own_loop: our loop continues, from one file for all processes or from slices that it reads itself.

    Raises:
        UserError: nothing there, or nothing that this run can continue.
    """
    lora, notes = build.lora if build else None, list[str]()
    if build and lora:
        if run.engine == MINDSPORE and run.use_parallel and _cuts(build):
            raise UserError(
                "pet_config with resume_training is not built for adapters that are cut over devices: continue with "
                "--parallel.parallel_mode 0 (data parallel) or on one device, or start again from the base weights"
            )
        run, notes = settle_adapters(run, lora)
    began = None  # weights that the run began with; a run's checkpoints are no such folder
    if run.load and lora is None and (Path(run.load) / CONFIG).is_file():
        began, run = run.load, replace(run, load=None)
        notes.append(f"resume_training: the run that began with load_checkpoint {began} goes on")
    folder = Path(run.load or Path(run.output_dir) / "checkpoint")
    suffix = run.suffix
    if own_loop and not rank_holds(folder, suffix) and rank_holds(folder, SAFETENSORS):
        suffix = SAFETENSORS
    if not run.load and not rank_holds(folder, suffix):
        left = remove_leftovers(folder)
        what = f" ({', '.join(path.name for path in left)} was half written)" if left else ""
        note = f"resume_training: {folder} holds no whole checkpoint yet{what}, the run starts from step 0"
        return replace(run, resume=False, load=began or run.base, base=None), [note], None
    if suffix == SAFETENSORS and not run.use_parallel and not own_loop:
        raise UserError(
            f"cannot resume from {folder}: MindFormers resumes one device from .ckpt only, load_ckpt_format is "
            "safetensors; save with checkpoint_format: ckpt, or start from the weights without --resume_training"
        )
    if folder.is_file():
        reason = fault(folder)
        if reason:
            raise UserError(f"cannot resume from {folder}: {reason}")
        if build:
            _check_whole(folder, build)
        devices = build.network.parallel.device_num if build else 1
        run = replace(run, load=str(folder)) if own_loop else for_every_rank(run, folder, devices)
        return run, [*notes, f"resuming from {folder}"], None
    return _from_folder(run, folder, suffix, build, own_loop, notes)


def _from_folder(
    run: RunSpec, folder: Path, suffix: str, build: BuildSpec | None, own_loop: bool, notes: list[str]
) -> Settled:
    wanted = run.resume if isinstance(run.resume, str) else None
    devices = build.network.parallel.device_num if build else 1
    ranks = rank_folders(folder) if folder.is_dir() else {}
    cuts = not own_loop and run.use_parallel and _cuts(build)
    saved, passed_over = _chosen(folder, wanted, suffix, build, own_loop or (len(ranks) != devices and not cuts))
    remove_leftovers(folder)
    notes = [
        *notes,
        *(f"passed over: {reason}" for reason in passed_over),
        f"resuming from {saved.path}, the newest whole checkpoint (epoch {saved.epoch}, step {saved.step} of it)",
    ]
    run = replace(run, load=str(folder), resume=saved.path.name)
    if build is None:
        return run, notes, None
    if cuts:
        if not run.auto_transform:  # with it, MindFormers cuts by the strategy that it has compiled
            _check_slices(folder, saved, build)
        return run, notes, None
    if _is_whole(saved.path, build):
        if not own_loop and not (len(ranks) == devices and all(_holds(rank, saved) for rank in ranks.values())):
            notes.append(f"all processes load {saved.path}, which holds the whole network")
            run = for_every_rank(run, saved.path, devices)
        strategies = run.strategies if run.base else None
        return replace(run, auto_transform=False, strategies=strategies), notes, None
    if len(ranks) == 1 or run.base:
        _check_whole(saved.path, build)
    strategies = run.strategies or folder.parent / STRATEGY
    if not strategies.exists():
        raise UserError(
            f"cannot resume from {folder}: it holds the slices of {len(ranks)} ranks, and {strategies} does not exist; "
            f"give the folder {STRATEGY} of the run that saved it (--src_strategy_path_or_dir); if these are whole "
            "copies of another network, give its configuration (tools/inspect_ckpt.py shows what they hold)"
        )
    run = replace(run, strategies=strategies, auto_transform=False)
    if own_loop:
        return run, [*notes, f"the slices of {len(ranks)} ranks are put together by {strategies}"], None
    request = merge_request(run, folder, saved.ending)
    merged = merged_file(request)
    run = for_every_rank(replace(run, load_format="ckpt"), merged, devices, saved.ending)
    return run, [*notes, f"the slices of {len(ranks)} ranks are merged to {merged}"], request


def for_every_rank(run: RunSpec, file: Path, devices: int, ending: str = "") -> RunSpec:
    """``run`` that loads ``file``, which need not be there yet, on all ranks: MindFormers resumes from a folder per
    rank alone, so each gets a link to it. ``ending``: of the links' names, by default of the file's."""
    saved = saved_as(file)
    ending = ending or (saved.ending if saved else "")
    folder = Path(run.output_dir) / RESUMED
    for rank in range(devices):
        link = folder / f"rank_{rank}" / f"whole_rank_{rank}{ending}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        put_link(link, file.resolve())  # all ranks do this at once
    return replace(run, load=str(folder), resume=f"whole_rank_0{ending}{file.suffix}")


def _holds(folder: Path, saved: Saved) -> Path | None:
    """The file of the step ``saved`` in another rank's folder."""
    return next((item.path for item in saved_in(folder, saved.path.suffix) if item.ending == saved.ending), None)


def rank_holds(folder: Path, suffix: str) -> bool:
    """Whether a rank folder below ``folder`` holds a file that ends in ``suffix``."""
    ranks = rank_folders(folder).values() if folder.is_dir() else ()
    return any(path for rank in ranks for path in rank.glob(f"*{suffix}"))


def _cuts(build: BuildSpec | None) -> bool:
    """Whether devices hold slices of the network."""
    return build is not None and build.network.parallel.parallel_mode in SHARDED_MODES


def _chosen(
    folder: Path, wanted: str | None, suffix: str, build: BuildSpec | None, alone: bool
) -> tuple[Saved, tuple[str, ...]]:
    """The step to continue from, and what was passed over.

    A step that all ranks hold; but where the first rank's file holds the whole network, others need not have it, which
    counts if this run has other processes (``alone``) or the folder has seen a run that had.
    """
    first = _of_first_rank(folder, wanted, suffix, build)
    if first and alone:
        return first, ()
    try:
        point = choose_resume(folder, wanted, suffix)
    except UserError:
        if first is None:
            raise
        return first, ()
    newer = first is not None and first.run > point.saved.run
    return (first, ()) if first and newer else (point.saved, point.passed_over)


def _of_first_rank(folder: Path, wanted: str | None, suffix: str, build: BuildSpec | None) -> Saved | None:
    """The checkpoint of the first rank, if that holds the whole network: other ranks need not have it."""
    if build is None:
        return None
    if wanted:
        found = next(
            (item for item in saved_in(folder / "rank_0", suffix) if item.path.stem == Path(wanted).stem), None
        )
        found = found if found and fault(found.path) is None else None
    else:
        found = last_whole(folder / "rank_0", suffix)
    return found if found and _is_whole(found.path, build) else None


def _is_whole(file: Path, build: BuildSpec) -> bool:
    try:
        _check_whole(file, build)
    except UserError:
        return False
    return True


def _check_whole(file: Path, build: BuildSpec) -> None:
    """Whether ``file`` holds all weights of the network, or all of its adapters.

    Raises:
        UserError: lists what is missing, of another shape, or not the network's.
    """
    if build.lora is None:
        check_shapes(file, build.network.model)
        _check_masks(file, build)
        return
    with closing(open_checkpoint(file)) as reader:
        held = {name: info.shape for name, info in reader.infos.items() if name.endswith((LORA_A, LORA_B))}
        held = {name: shape for name, shape in held.items() if name.startswith(WEIGHTS)}
    wanted = {item.name: item.whole for item in placed_parameters(build.network, lora=build.lora) if item.trained}
    problems = Problems(f"cannot resume from {file}: its adapters are not those of pet_config")
    wrong = [f"{n} is {held[n]}, not {shape}" for n, shape in wanted.items() if held.get(n, shape) != shape]
    problems.add_names("adapters", "of another shape", wrong, "set lora_rank to that of the run that saved it")
    missing, extra = [n for n in wanted if n not in held], [n for n in held if n not in wanted]
    for what, names in (("missing", missing), ("too many", extra)):
        problems.add_names("adapters", what, names, "set target_modules and exclude_layers to those of that run")
    problems.raise_if_any()


def _check_masks(file: Path, build: BuildSpec) -> None:
    """Whether ``file`` holds the masks of a network that has some, whole.

    Raises:
        UserError: lists what is missing or of another shape.
    """
    if build.pruning is None:
        return
    with closing(open_checkpoint(file)) as reader:
        held = {name: info.shape for name, info in reader.infos.items()}
    problems = Problems(f"cannot resume from {file}: its masks are not those of l0_module")
    wanted = {name: shape for name, shape, trained in build.pruning.parameters() if trained}
    problems.add_names(
        "parameters of masks",
        "missing or of another shape",
        [name for name, shape in wanted.items() if held.get(name) != shape],
        "give l0_module of the run that saved it; to prune a trained model set resume_training: False",
    )
    problems.raise_if_any()


def _check_slices(folder: Path, saved: Saved, build: BuildSpec) -> None:
    """Every rank's slices must be those of this run's split: MindFormers would stop in the middle of loading them."""
    parallel, placed = build.network.parallel, placed_parameters(build.network, lora=build.lora, pruning=build.pruning)
    ranks, found = rank_folders(folder), ""
    if len(ranks) != parallel.device_num:
        found = f"{len(ranks)} ranks have saved it, this run has {parallel.device_num}"
    per_stage = max(1, parallel.device_num // max(1, parallel.pipeline_stage))
    for rank, place in ranks.items():
        file = _holds(place, saved)
        if found or file is None:
            break
        with closing(open_checkpoint(file)) as reader:
            held = {name: info.shape for name, info in reader.infos.items()}
        for item in placed:
            if item.stage != rank // per_stage or (build.lora and not item.trained):
                continue
            if item.name not in held:
                found = f"rank_{rank} lacks {item.name}, which stage {item.stage} has"
            elif held[item.name] not in (item.local, item.gathered):
                found = f"{item.name} is {held[item.name]} in rank_{rank}, a slice of this run is {item.local}"
    if found:
        raise UserError(
            f"cannot resume from {folder}: it was cut by another split ({found}). Set --auto_trans_ckpt True and "
            f"--src_strategy_path_or_dir {folder.parent / STRATEGY}, or cut it before: tools/dryrun.py writes this "
            f"run's strategy, then python tools/transform_ckpt.py --src_ckpt_dir {folder} --src_ckpt_strategy "
            f"{folder.parent / STRATEGY} --dst_ckpt_strategy DRYRUN/strategy --dst_ckpt_dir NEW --pick {saved.label}, "
            "and continue with --load_checkpoint NEW"
        )
