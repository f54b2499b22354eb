# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: written beside under a hidden name, flushed to disk, renamed into place.

The hidden name ``.NAME.RANDOM.partial`` is made anew (never one that stands there, nor a link) and locked while it is
written. A killed run leaves at most one; the next run for the same output removes it, by its lock: what nobody holds is
dead. A live one means that another process writes the same output. Links under such names, and what belongs to other
users, are left alone.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindformers_ext.core.errors import UserError

ATTEMPTS, PAUSE = 4, 0.1  # two runs that begin at once see each other: both step back for a moment
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
MOVING = ".moving"  # in the folder of a group whose files move: their names


def refuse_existing(path: Path, overwrite: bool) -> None:
    """An output that exists is a ``UserError`` unless ``overwrite`` (an empty folder is no obstacle)."""
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not overwrite and not empty:
        raise UserError(f"output '{path}' exists: choose another path, or pass --overwrite to replace it")


@contextmanager
def fresh_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path to write; on success the file there becomes ``path``, on an exception it is removed."""
    if path.is_dir():
        raise UserError(f"output '{path}' is a folder: give a file name")
    refuse_existing(path, overwrite)
    with _claimed(path, folder=False) as partial:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a short file whole, in place of an older one; the rest as for ``shared_file``."""
    with shared_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def shared_file(path: Path) -> Iterator[Path]:
    """Yield a path to write; on success the file there replaces ``path``. Several processes, of several machines, may
    write the same content at once; what dead ones left is removed."""
    beside, descriptor = _locked(path, folder=False, kind="text")
    try:
        yield beside
        flush(beside)
        _is_alive(path, beside, "text")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)
    flush(path.parent)


def put_link(path: Path, target: Path) -> None:
    """A link to ``target`` in place of an older one. Several processes, of several machines, may do so at once."""
    beside = _hidden(path, "link")
    beside.symlink_to(target)
    try:
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def fresh_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes ``path``, on an exception it is removed.

    With ``overwrite`` the old folder is moved aside first and deleted last, so that a whole one exists at any time but
    the moment between two renames.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"output '{path}' is a file: give a folder name")
    refuse_existing(path, overwrite)
    with _claimed(path, folder=True) as partial:
        yield partial
        for item in partial.iterdir():
            flush(item)
        flush(partial)
        old = _hidden(path, "old")
        if path.exists() or path.is_symlink():
            os.rename(path, old)
        os.rename(partial, path)
        flush(path.parent)
        for item in (old, *_beside(path, "old")):
            _remove(item)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``path``, the output of this run, for what is needed while it works; removed at the
    end, or where the run was killed by the next one for the same output."""
    with _claimed(path, folder=True) as beside:
        yield beside


@contextmanager
def fresh_group(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill with files that belong together; on success they move beside ``path``.

    Longer names move first: of ``rows`` with its index ``rows.db`` the index is there before the file, and of shards
    ``rows0`` comes last, so a group whose first file can be seen is whole. What is replaced is removed before, the
    first file first; on an exception nothing has moved. A run killed between the moves has left a list of the group's
    files beside those that wait: ``recover_group`` takes back what moved.
    """
    recover_group(path)
    with _claimed(path, folder=True) as partial:
        yield partial
        names = sorted((item.name for item in partial.iterdir()), key=lambda name: (len(name), name))
        targets = [path.with_name(name) for name in names]
        for name, target in zip(names, targets, strict=True):
            flush(partial / name)
            refuse_existing(target, overwrite)
        (partial / MOVING).write_text("\n".join(names), encoding="utf-8")
        flush(partial / MOVING)
        flush(partial)
        for target in targets:
            target.unlink(missing_ok=True)
        for name, target in zip(reversed(names), reversed(targets), strict=True):
            os.rename(partial / name, target)
        flush(path.parent)


def recover_group(path: Path) -> None:
    """Take back what a run that was killed between the moves of the group ``path`` has moved: it was never whole.

    Raises:
        UserError: a live process writes the group.
    """
    if not path.parent.is_dir():
        return
    for partial in _beside(path, "partial"):
        if (partial / MOVING).is_symlink() or not (partial / MOVING).is_file():
            continue
        descriptor = os.open(partial, FOLDER)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            listed = (partial / MOVING).read_text(encoding="utf-8", errors="replace").split("\n")
            names = [name for name in listed if name.startswith(path.name) and "/" not in name and "\0" not in name]
            moved = [name for name in names if not (partial / name).exists()]
            if len(moved) < len(names):  # else the first file, which comes last, is there
                for name in moved:
                    path.with_name(name).unlink(missing_ok=True)
            _remove(partial)
        except BlockingIOError as error:
            raise UserError(f"output '{path}' is being written by another process: wait for it") from error
        finally:
            os.close(descriptor)


def flush(path: Path) -> None:
    """Make sure that a file's data, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _claimed(path: Path, folder: bool) -> Iterator[Path]:
    """A new hidden file or folder beside ``path``, locked; what dead runs left for ``path`` is removed.

    What still stands under the hidden name at the end is removed too.

    Raises:
        UserError: another process writes ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        beside, descriptor = _locked(path, folder)
        try:
            if not _is_alive(path, beside):
                yield beside
                return
        finally:
            _remove(beside)
            os.close(descriptor)
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * random.random())
    raise UserError(f"output '{path}' is being written by another process: wait for it or choose another")


def _locked(path: Path, folder: bool, kind: str = "partial") -> tuple[Path, int]:
    """A new hidden file or folder and the descriptor that locks it."""
    while True:
        beside = _hidden(path, kind)
        if folder:
            os.mkdir(beside)
        try:
            descriptor = os.open(beside, FOLDER) if folder else os.open(beside, NEW, 0o666)
        except FileNotFoundError:
            if not folder:
                raise
            continue  # another run took it for a dead one's before it was locked
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        here, there = os.fstat(descriptor), _lstat(beside)
        if there is not None and (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return beside, descriptor
        os.close(descriptor)


def _is_alive(path: Path, own: Path, kind: str = "partial") -> bool:
    """Whether another run is writing ``path``; what dead ones left is removed."""
    alive = False
    for other in _beside(path, kind):
        if other == own:
            continue
        try:
            descriptor = os.open(other, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone by now, or not to be opened: then it is no run of ours
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(other)
        except BlockingIOError:
            alive = True
        finally:
            os.close(descriptor)
    return alive


def _hidden(path: Path, kind: str) -> Path:
    """A name that nobody can foresee, beside ``path``."""
    return path.parent / f".{path.name}.{secrets.token_hex(6)}.{kind}"


def _beside(path: Path, kind: str) -> list[Path]:
    """What has such a name and may be ours: files and folders of this user, no links."""
    pattern = re.compile(re.escape(f".{path.name}.") + rf"[0-9a-f]{{12}}\.{kind}")
    found = [item for item in path.parent.iterdir() if pattern.fullmatch(item.name)]
    states = [(item, _lstat(item)) for item in found]
    return [
        item
        for item, state in states
        if state and state.st_uid == os.geteuid() and (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode))
    ]


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
