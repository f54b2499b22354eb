# SPDX-License-Identifier: Apache-2.0
"""The package's logger: standard library logging under one name, silent until a command sets it up."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path

from mindformers_ext.core.plain_file import open_plain

NAME = "mindformers_ext"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MARK = "mindformers_ext_handler"  # handlers that set_up made, so that a second call replaces only those

logging.getLogger(NAME).addHandler(logging.NullHandler())


class _LogFile(logging.FileHandler):
    """The end of a file, never through a link."""

    def _open(self) -> TextIOWrapper:
        return os.fdopen(open_plain(self.baseFilename), "a", encoding=self.encoding)


def get_logger(name: str = NAME) -> logging.Logger:
    """The logger of a module (pass ``__name__``) or of the package."""
    return logging.getLogger(name if name == NAME or name.startswith(NAME + ".") else f"{NAME}.{name}")


def set_up_logging(
    level: int | str = logging.INFO, file: str | Path | None = None, more: Iterable[logging.Handler] = ()
) -> logging.Logger:
    """Send the package's messages to stderr, to ``more`` and, where given, to ``file``; calling it again replaces the
    former set-up.

    Records do not travel on to the root logger: frameworks set that one up for themselves and would print them twice.
    """
    logger = logging.getLogger(NAME)
    for handler in [handler for handler in logger.handlers if handler.get_name() == _MARK]:
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), *more]
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.set_name(_MARK)
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger
