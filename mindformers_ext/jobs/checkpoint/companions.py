# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights of a Hugging Face folder that say how text goes in and out; they travel with a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.formats.atomic import flush

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tekken.json")
COMPANIONS = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
FOLDERS = {"additional_chat_templates": ".jinja"}  # and what their files end in


@dataclass(frozen=True)
class Copied:
    """Names below the folder of what was copied, and of links that lead out of it and were not."""

    names: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.left:
            return ()
        return (f"not copied, as they are links that lead out of their folder: {', '.join(self.left)}",)

    @property
    def has_tokenizer(self) -> bool:
        """Whether one of them is a tokenizer."""
        return any(name in self.names for name in TOKENIZERS)


def copy_companions(source: Path, target: Path) -> Copied:
    """Copy every companion of the model folder ``source`` into the folder ``target``, as it is."""
    names, left = [], []
    for name in _names(source):
        file = source / name
        if not belongs(file, source):
            left.append(name)
        elif file.is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)
            flush(target / name)
            names.append(name)
    return Copied(tuple(names), tuple(left))


def is_companion_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that a model folder may hold."""
    return path.name in FOLDERS and path.is_dir() and not path.is_symlink()


def _names(source: Path) -> Iterator[str]:
    yield from (name for name in COMPANIONS if (source / name).is_file() or (source / name).is_symlink())
    for folder, suffix in FOLDERS.items():
        if (source / folder).is_dir():
            yield from (f"{folder}/{path.name}" for path in sorted((source / folder).glob(f"*{suffix}")))


def belongs(file: Path, source: Path) -> bool:
    """Whether ``file`` is below ``source``, or is a link as the hub's cache has it: snapshots/X/F -> blobs/Y."""
    found, home = file.resolve(), source.resolve()
    blobs = home.parent.parent / "blobs"
    return found.is_relative_to(home) or (home.parent.name == "snapshots" and found.is_relative_to(blobs))
