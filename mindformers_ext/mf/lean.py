# SPDX-License-Identifier: Apache-2.0
"""MindFormers without the libraries that it imports for a few of its functions: they are imported when one is called.

Its metrics import nltk, jieba and rouge_chinese, its TensorBoard writer torch, its reader of Hugging Face data sets
pandas and aiohttp: two thirds of the seconds in which a process of ours starts.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

LATER = (
    "datasets",
    "datasets.distributed",
    "jieba",
    "nltk",
    "nltk.translate",
    "nltk.translate.bleu_score",
    "rouge_chinese",
    "tensorboardX",
)


class _Later:
    """A name of a module that is imported when the name is used: called, asked for an attribute or in isinstance."""

    def __init__(self, module: str, name: str) -> None:
        self._where = module, name

    def _found(self) -> Any:
        module, name = self._where
        return getattr(importlib.import_module(module), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._found()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self._found())


class _LaterModule(ModuleType):
    """Stands where a module would: each of its names is one for later."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self.__name__, name)


def import_mindformers() -> None:
    """Import MindFormers with stand-ins for ``LATER``; those that are imported already stay as they are."""
    if "mindformers" in sys.modules:
        return
    names = [name for name in LATER if name.partition(".")[0] not in sys.modules]
    sys.modules.update({name: _LaterModule(name) for name in names})
    try:
        importlib.import_module("mindformers")
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), _LaterModule):
                del sys.modules[name]


@contextmanager
def without(name: str) -> Iterator[None]:
    """Inside, importing module ``name`` fails, as where it is not installed; one that is imported already stays.

    For libraries that import another one only if it is there, to convert its types: tensorboardX imports torch, which
    takes longer and more memory than all else that a training process of ours imports for MindFormers.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign for "not to be found"
    try:
        yield
    finally:
        del sys.modules[name]
