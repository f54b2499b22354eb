# SPDX-License-Identifier: Apache-2.0
"""Room on the disk, and what the system refuses, in words."""

from __future__ import annotations

import shutil
from pathlib import Path

from mindformers_ext.core.errors import UserError


def free_bytes(path: Path) -> int:
    """What the disk has left on which ``path`` is written beside its final place; folders need not exist yet."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


def check_space(path: Path, nbytes: int, inside: bool = False) -> None:
    """The disk of ``path`` must have room for ``nbytes`` (an old output stays until the new one is whole).

    ``inside``: files go into the folder ``path`` one by one, which may be a link or a disk of its own.
    """
    free = free_bytes(path / "file" if inside else path)
    if nbytes > free:
        raise UserError(
            f"'{path}' needs {nbytes} bytes ({nbytes / 1e9:.2f} GB), the disk has {free} "
            f"({free / 1e9:.2f} GB) free: make room there"
        )


def refusal(error: OSError, task: str) -> UserError:
    """An error of the system as a message; ``task``: "read 'a' or to write 'b'"."""
    where = f" ('{error.filename}')" if error.filename else ""
    return UserError(
        f"the system refused to {task}: {error.strerror}{where}; check the path, its permissions and the room on the "
        "disk"
    )
