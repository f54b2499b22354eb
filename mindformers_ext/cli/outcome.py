# SPDX-License-Identifier: Apache-2.0
"""How a command ends: the one door through which all of them leave, with an exit code and, after a mishap, a message.

A traceback stands for a fault of this program. What the user can mend (a mistake in the input, a full disk, too little
memory) is plain text and code 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import NoReturn

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.log import get_logger

USER_MISTAKE = 2
INTERRUPTED = 130  # what a shell reports after Ctrl-C
A_MOMENT = 0.01  # seconds
READER_LEFT = 141  # the same of a program whose reader (head, less) has gone

_ROOM = "make room there, or choose another place"
_RIGHTS = "choose a place where you may write, or change its permissions"
ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file: choose another place",
    errno.EISDIR: "this is a folder: give a file",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENOTEMPTY: "choose another name, or remove what is there",
    errno.ENOENT: "check the path",
    errno.ELOOP: "its links lead in a circle: give the path itself",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: try again later",
    errno.ENOMEM: "free some memory, or use a machine with more",
    errno.EAGAIN: "the machine has too many processes: try again later, or with fewer of them",
    errno.EIO: "the disk reports an error: check it",
}


def exit_code(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, unwinds: bool = True) -> int:
    """The exit code of ``run(arguments)``; a mishap (``mishap``) is printed to stderr and gives 2, a closed pipe 141.

    Ctrl-C gives 130, and with ``unwinds`` SIGTERM leaves as an exception too, so that what has not been finished is
    removed and processes that were started end. A run that computes for long inside a library should die at once.
    """
    try:
        with _heard(), _unwound() if unwinds else nullcontext():
            code = run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") in ("", "0"):  # torchrun's other processes are interrupted with the first
            _tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        return READER_LEFT
    except Exception as error:
        told = mishap(error)
        if told is None:
            raise
        get_logger(__name__).debug("%s", told, exc_info=True)
        _tell(f"error: {told}")
        with suppress(ValueError):  # closed
            try:
                sys.stdout.flush()
            except OSError:
                _leave_stdout()
        return USER_MISTAKE


def mishap(error: BaseException) -> str | None:
    """What to tell the user about ``error``, None for a fault of this program.

    Told are ``UserError``, what the system refuses (``OSError``), memory that is not there, nesting too deep for
    Python, and text that no file or path can hold.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _refused(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _is_torchs_lack(error):
        return (
            f"there is not enough memory{_detail(error)}: free some, use a machine with more, or make the job smaller"
        )
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read"
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written{_detail(error)}: correct its characters"
    if type(error) is ValueError and "null byte" in str(error):
        return "a path holds a character of value 0: correct it"
    return None


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt also while MindSpore runs a graph: it answers Ctrl-C by sending SIGTERM to itself.

    So SIGTERM is one as well inside. Only the main thread may say so; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refused(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    if error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    where = " and ".join(f"'{name if len(name) <= 300 else name[:300] + '...'}'" for name in names)
    what = f"{where}: {error.strerror}" if where else f"the system refused what was asked ({error.strerror})"
    return f"{what}: {ADVICE.get(error.errno, 'check the path, its permissions and the disk')}"


def _is_torchs_lack(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _detail(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f" ({text})" if text else ""


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be closed, or on the disk that is full
        print(text, file=sys.stderr, flush=True)


def _leave_stdout() -> None:
    """Python writes what is left at exit: nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _unwound() -> Iterator[None]:
    """Inside, SIGTERM is a SystemExit (in the main thread, the only one that may say so)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _heard() -> Iterator[None]:
    """Python drops what is raised in callbacks of weak references and in ``__del__``, also by a signal that comes there
    (imports have such callbacks): inside, a signal that was dropped so comes again a moment later."""
    before = sys.unraisablehook

    def again(lost: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
        if number is None or threading.current_thread() is not threading.main_thread():
            before(lost)
            return
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, A_MOMENT)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
