# SPDX-License-Identifier: Apache-2.0
"""Files that are written in place, under a name that can be foreseen (logs, metrics): never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from mindformers_ext.core.errors import UserError

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
AFRESH = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def open_plain(path: str | os.PathLike[str], flags: int = APPEND) -> int:
    """A descriptor of the regular file ``path``, opened with ``flags`` of ``os.open``; folders above it may be links.

    Raises:
        UserError: a link, a pipe or a device stands there.
    """
    try:  # a pipe without a reader would wait for one
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        refuse_other(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse_other(path)
    return descriptor


def refuse_other(path: str | os.PathLike[str]) -> None:
    """A ``UserError`` where ``path`` is there and is no regular file, but a link, a pipe or a device."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        return
    what = "a link, which is not followed" if stat.S_ISLNK(mode) else "no regular file"
    raise UserError(f"'{Path(path)}' is {what}: remove it, or choose another folder for the output")
