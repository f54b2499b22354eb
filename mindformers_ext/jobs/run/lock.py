# SPDX-License-Identifier: Apache-2.0
"""One training at a time in an output folder: two would mix their metrics and remove each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger
from mindformers_ext.core.plain_file import open_plain

LOCK = ".training.lock"
HELD = (errno.EACCES, errno.EAGAIN)
WITHOUT = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # file systems that have no locks


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 of its job, which holds the folder for all of them: no scheduler of msrun's."""
    return environment.get("MS_ROLE") != "MS_SCHED" and all(
        environment.get(name, "0") in ("", "0") for name in ("RANK", "RANK_ID")
    )


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made if need be, until the end of the block or of the process.

    The lock is the system's (fcntl): it ends with its process, however that ends, and children do not inherit it. A
    lock file without a living holder is taken over.

    Raises:
        UserError: another process trains there.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _opened(path, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _opened(path: Path, folder: Path) -> int:
    """A locked descriptor of the file that ``path`` names (the last holder may remove it between two steps of ours)."""
    while True:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError as error:
            if error.errno in WITHOUT:
                get_logger(__name__).warning("%s cannot be locked (%s): start no second training there", folder, error)
                return descriptor
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno not in HELD:
                raise
            raise UserError(
                f"another training (process {holder or 'unknown'}) writes into {folder}: wait for its end, stop it, or "
                "give another --output_dir"
            ) from error
        os.close(descriptor)
