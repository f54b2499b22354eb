# SPDX-License-Identifier: Apache-2.0
"""Cuts, merges and cuts anew MindSpore checkpoints by strategy files: whole <-> ranks <-> other ranks.

Every rank's file appears whole or not at all. A killed run leaves finished ranks and a note of what it did; the same
command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError, listed
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.formats.disk import check_space, refusal
from mindformers_ext.formats.ms_file import SUFFIXES
from mindformers_ext.formats.rank_dirs import checkpoint_files, rank_files, rank_folders
from mindformers_ext.formats.strategy import read_strategy
from mindformers_ext.jobs.checkpoint.saved import saved_in
from mindformers_ext.jobs.checkpoint.source import rank_meta
from mindformers_ext.jobs.checkpoint.transform_workers import RankFiles, RankTask, open_source, run_tasks
from mindformers_ext.weights.reshard import SlicedReader
from mindformers_ext.weights.reshard_plan import Unlisted, plan_reshard

NOTE = ".transform_ckpt.json"
LAST = "last"


@dataclass(frozen=True, kw_only=True)
class TransformRequest:
    """What to transform. A strategy of None means whole; ``output_format`` None keeps the source's.

    ``rank_id``: None does all target ranks here, with ``process_num`` processes; a number does the share of that rank
    alone, as MindFormers divides the work among processes that the user starts.
    """

    src_ckpt_dir: Path
    dst_ckpt_dir: Path
    src_strategy: Path | None = None
    dst_strategy: Path | None = None
    prefix: str = "checkpoint_"
    output_format: str | None = None
    rank_id: int | None = None
    world_size: int | None = None
    process_num: int = 1
    unlisted: Unlisted = "error"
    pick: str | None = None
    check_copies: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class TransformReport:
    """What was or would be written. ``kept``: ranks that an earlier, interrupted run of this command had finished."""

    files: tuple[tuple[Path, int, int], ...]
    kept: tuple[Path, ...]
    seconds: float
    left: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data of all files written."""
        return sum(size for _, _, size in self.files)


def transform(request: TransformRequest) -> TransformReport:
    """Run the transformation; everything is checked before the first byte is written.

    Raises:
        UserError: anything wrong with the source, the strategies, the options or the target folder.
    """
    try:
        return _transform(request)
    except OSError as error:
        raise refusal(error, f"read '{request.src_ckpt_dir}' or to write '{request.dst_ckpt_dir}'") from error


def _transform(request: TransformRequest) -> TransformReport:
    source, target = find_source(request), read_strategy(request.dst_strategy) if request.dst_strategy else None
    if source.strategy is None and target is None:
        raise UserError(
            "the source is whole and no --dst_ckpt_strategy is given: there is nothing to transform; give "
            "--src_ckpt_strategy to merge ranks, or --dst_ckpt_strategy to cut"
        )
    ranks, notes = share(request, target.world if target else 1)
    rank_meta(source.files[0])  # only checked here: what writes reads it again
    reader = open_source(source)
    try:
        whole_on_ranks = frozenset(reader.unlisted) if isinstance(reader, SlicedReader) else frozenset()
        plan = plan_reshard(reader.infos, target, whole_on_ranks, request.unlisted)
        left = dict(plan.left)
        if isinstance(reader, SlicedReader) and request.check_copies:
            reader.check_copies()
        if isinstance(reader, SlicedReader) and reader.absent:
            left["state that the source's strategy lists and no rank holds"] = reader.absent
    finally:
        reader.close()
    suffix = f".{request.output_format}" if request.output_format else source.files[0].suffix
    tasks = [
        RankTask(rank, request.dst_ckpt_dir / f"rank_{rank}" / f"{request.prefix}{rank}{suffix}", plan.ranks[rank])
        for rank in ranks
    ]
    note = _Note(request, _fingerprint(request, source, suffix))
    existing = _check_target(request, source, tasks, len(plan.ranks))
    kept = note.finished(existing)
    todo = [task for task in tasks if task.path not in kept]
    if len(kept) < len(existing) and not request.overwrite:
        found = next(path for path in existing if path not in kept)
        raise UserError(f"output '{found}' exists: choose another folder, or pass --overwrite to replace it")
    check_space(request.dst_ckpt_dir, sum(plan.nbytes(task.rank) for task in todo), inside=True)
    files = tuple((task.path, len(task.parts), plan.nbytes(task.rank)) for task in todo)
    if request.dry_run:
        return TransformReport(files, tuple(kept), 0.0, left, tuple(notes))
    note.write(existing)
    processes = 1 if request.rank_id is not None else min(request.process_num, max(len(todo), 1))
    seconds = run_tasks(source, todo, processes, request.overwrite)
    if ranks and request.rank_id is not None:  # what MindFormers' processes look for when they share the work
        (request.dst_ckpt_dir / f"transform_succeed_rank_{request.rank_id}.txt").touch()
    note.path.unlink(missing_ok=True)
    return TransformReport(files, tuple(kept), seconds, left, tuple(notes))


def find_source(request: TransformRequest) -> RankFiles:
    """The source's files and strategy, which fit each other in number.

    Raises:
        UserError: several ranks without a strategy, a strategy for more ranks than there are, or ``rank_files``'s.
    """
    path = request.src_ckpt_dir
    files = rank_files(path, _label(path, request.pick) if request.pick else None)
    wrong = [file for file in files.values() if file.suffix not in SUFFIXES]
    if wrong:
        raise UserError(f"'{wrong[0]}' must end in {' or '.join(SUFFIXES)}: the ending tells the format")
    if request.src_strategy is None:
        if len(files) > 1:
            raise UserError(
                f"'{path}' holds {len(files)} ranks and no --src_ckpt_strategy is given: without it the parts cannot "
                "be put together; give the folder output/strategy of the run"
            )
        return RankFiles(files, None)
    strategy = read_strategy(request.src_strategy)
    if len(files) == 1 < strategy.world:
        raise UserError(
            f"'{path}' holds one rank, --src_ckpt_strategy describes {strategy.world}: leave the strategy away for a "
            "whole checkpoint, or give all ranks"
        )
    return RankFiles(files, strategy)


def _label(path: Path, pick: str) -> str:
    """The end of the file names to use: ``pick`` itself, or for "last" the newest step that every rank has."""
    if pick != LAST:
        return pick
    held = []
    for folder in rank_folders(path).values() if path.is_dir() else ():
        held.append({(saved.run, saved.epoch, saved.step) for suffix in SUFFIXES for saved in saved_in(folder, suffix)})
    common = set.intersection(*held) if held else set()
    if not common:
        raise UserError(
            f"--pick last: no step is in every rank folder of '{path}' as PREFIX_rank_N-EPOCH_STEP.ckpt; name the end "
            "of the files with --pick instead, for example --pick 3_2"
        )
    run, epoch, step = max(common)
    return f"_{run}-{epoch}_{step}" if run else f"-{epoch}_{step}"


def share(request: TransformRequest, world: int) -> tuple[Sequence[int], list[str]]:
    """The target ranks to write here, and notes.

    Raises:
        UserError: ``world_size`` is not the target's, or ``process_num`` does not divide it.
    """
    problems, notes = Problems("options"), []
    number = request.process_num
    if request.world_size is not None and request.world_size != world:
        problems.add(f"--world_size {request.world_size}", f"the target has {world} ranks; leave it away")
    problems.positive("--transform_process_num", number)
    if number > world:
        notes.append(f"--transform_process_num {number} is more than the {world} target ranks: {world} are used")
        number = world
    if number > 0:
        problems.divides("target ranks", world, "--transform_process_num", number)
    if request.rank_id is not None and not 0 <= request.rank_id < world:
        problems.add(f"--rank_id {request.rank_id}", f"the target has ranks 0 to {world - 1}")
    problems.raise_if_any()
    if request.rank_id is None:
        return range(world), notes
    size = world // number
    if request.rank_id % size:
        notes.append(
            f"rank {request.rank_id} has nothing to do: ranks {listed(list(range(0, world, size)))} transform "
            f"{size} each"
        )
        return (), notes
    return range(request.rank_id, request.rank_id + size), notes


class _Note:
    """A hidden file in the target folder while a run is under way: which run, and what stood there before it began."""

    def __init__(self, request: TransformRequest, fingerprint: str) -> None:
        name = NOTE if request.rank_id is None else f".transform_ckpt_{request.rank_id}.json"
        self.path, self._run = request.dst_ckpt_dir / name, fingerprint
        self._before: dict[str, list[int]] | None = None
        with suppress(OSError, ValueError):  # no note, or not ours: then nothing is known about what is there
            told = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(told, dict) and told.get("run") == fingerprint and isinstance(told.get("before"), dict):
                self._before = told["before"]

    def finished(self, existing: list[Path]) -> list[Path]:
        """Those of ``existing`` that an interrupted run of the same command made."""
        before = self._before
        return [] if before is None else [path for path in existing if before.get(str(path)) != _stamp(path)]

    def write(self, existing: list[Path]) -> None:
        """Begin, or go on with, the run; ``existing`` will be replaced."""
        if self._before is not None:
            return
        told = {"run": self._run, "before": {str(path): _stamp(path) for path in existing}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(self.path, overwrite=True) as partial:
            partial.write_text(json.dumps(told), encoding="utf-8")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _fingerprint(request: TransformRequest, source: RankFiles, suffix: str) -> str:
    """Changes when the command, the source's files or a strategy change."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files.values()]
    strategies = [_digest(path) for path in (request.src_strategy, request.dst_strategy)]
    told = [stats, strategies, request.prefix, suffix, request.unlisted]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _digest(path: Path | None) -> list[str]:
    files = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _check_target(request: TransformRequest, source: RankFiles, tasks: list[RankTask], world: int) -> list[Path]:
    """The files of ``tasks`` that are there already; anything else in the way is a ``UserError``."""
    folder = request.dst_ckpt_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output '{folder}' is a file: give a folder")
    read = {path.resolve() for path in source.files.values()}
    if any(task.path.resolve() in read for task in tasks) or folder.resolve() == request.src_ckpt_dir.resolve():
        raise UserError(f"output '{folder}' is where the source lies: choose another folder")
    if not folder.is_dir():
        return []
    problems = Problems(f"output '{folder}'")
    beyond = [rank for rank in rank_folders(folder) if rank >= world]
    if beyond:
        problems.add(f"rank_{listed(beyond)} is there", f"the target has {world} ranks: remove what another run left")
    existing = []
    for task in tasks:
        found = checkpoint_files(task.path.parent) if task.path.parent.is_dir() else []
        others = [file.name for file in found if file != task.path]
        if others:
            problems.add(
                f"rank_{task.rank} holds {listed(others)}",
                "two files in a rank folder confuse every reader; remove it or choose another folder",
            )
        existing += [task.path] if task.path in found else []
    problems.raise_if_any()
    return existing
