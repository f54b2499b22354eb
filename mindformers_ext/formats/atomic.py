# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: written beside under a hidden name, flushed to disk, renamed into place.

A killed run leaves at most one hidden ``.NAME.partial``; the next run for the same output replaces it. A lock on it
keeps two live runs from writing the same output.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindformers_ext.core.errors import UserError

MOVING = ".moving"  # in the folder of a group whose files move: their names


def partial_path(path: Path) -> Path:
    """Where ``path`` is written until it is whole."""
    return path.parent / f".{path.name}.partial"


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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path)
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
            flush(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a short file whole, in place of an older one. Several processes may write the same text at once."""
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def fresh_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes ``path``, on an exception it is removed.

    With ``overwrite`` the old folder is moved aside first and deleted last, so that a whole one exists at any time but
    the moment between two renames.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"output '{path}' is a file: give a folder name")
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = partial_path(path), path.parent / f".{path.name}.old"
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, path)
        try:
            _empty(partial)
            yield partial
            for item in partial.iterdir():
                flush(item)
            flush(partial)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(path, old)
            os.rename(partial, path)
            flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


@contextmanager
def fresh_group(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill with files that belong together; on success they move beside ``path``.

    Longer names move first: of ``rows`` with its index ``rows.db`` the index is there before the file, and of shards
    ``rows0`` comes last, so a group whose first file can be seen is whole. What is replaced is removed before, the
    first file first; on an exception nothing has moved. A run killed between the moves has left a list of the group's
    files beside those that wait: ``recover_group`` takes back what moved.
    """
    recover_group(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, path)
        try:
            _empty(partial)
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
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def recover_group(path: Path) -> None:
    """Take back what a run that was killed between the moves of the group ``path`` has moved: it was never whole.

    Raises:
        UserError: a live process writes the group.
    """
    partial = partial_path(path)
    if partial.is_symlink() or not (partial / MOVING).is_file():
        return
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, path)
        listed = (partial / MOVING).read_text(encoding="utf-8", errors="replace").split("\n")
        names = [name for name in listed if name.startswith(path.name) and "/" not in name and "\0" not in name]
        moved = [name for name in names if not (partial / name).exists()]
        if len(moved) < len(names):  # else the first file, which comes last, is there
            for name in moved:
                path.with_name(name).unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Make sure that a file's data, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output '{path}' is being written by another process: wait for it or choose another"
        ) from error


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
