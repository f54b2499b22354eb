# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder of a run: ``rank_0/ .. rank_N/`` with one checkpoint file each, or one whole file."""

from __future__ import annotations

import re
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError, listed
from mindformers_ext.formats.ms_file import SUFFIXES

_RANK = re.compile(r"rank_(\d{1,9})")


def rank_folders(folder: Path) -> dict[int, Path]:
    """Rank -> its folder, in order; empty where there is none."""
    matches = [(_RANK.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files directly in ``folder`` (hidden ones, which are unfinished, are left out)."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def rank_files(source: Path, label: str | None = None) -> dict[int, Path]:
    """The one checkpoint file of every rank of ``source``: a folder of rank folders, of one file, or a file itself.

    Args:
        source: the path.
        label: chooses among several files of a rank folder the one whose name, without its ending, ends so.

    Raises:
        UserError: nothing there, ranks missing in the row, none or several files in a rank folder, mixed formats; all
            of them listed.
    """
    if not source.exists():
        raise UserError(f"checkpoint '{source}' does not exist: check the path")
    if source.is_file():
        return {0: source}
    folders = rank_folders(source)
    if not folders:
        return {0: _only_file(source)}
    problems = Problems(f"checkpoint '{source}'")
    missing = sorted(set(range(max(folders) + 1)) - set(folders)) if max(folders) < 2**20 else [0]
    if missing:
        problems.add(f"folder rank_{listed(missing)} is missing, rank_{max(folders)} is there", "copy all ranks")
    result = {}
    for rank, folder in folders.items():
        files = checkpoint_files(folder)
        if label is not None and files:
            chosen = [file for file in files if _ends(file.stem, label)]
            if not chosen:
                problems.add(
                    f"rank_{rank} holds no file that ends in '{label}'",
                    f"found {listed([file.name for file in files])}",
                )
                continue
            files = chosen
        if len(files) == 1:
            result[rank] = files[0]
        elif files:
            problems.add(
                f"rank_{rank} holds {len(files)} checkpoint files: {listed([file.name for file in files])}",
                "keep one, or choose with --pick last or --pick ENDING, for example --pick 3_2",
            )
        else:
            problems.add(f"rank_{rank} holds no checkpoint file", f"expected one *{' or *'.join(SUFFIXES)}")
    kinds = {file.suffix for file in result.values()}
    if len(kinds) > 1:
        problems.add("some ranks hold .ckpt and some .safetensors", "use ranks of one run in one format")
    problems.raise_if_any()
    return result


def _ends(stem: str, label: str) -> bool:
    """Whether ``stem`` ends in ``label``, and not in the middle of a number ("13_2" does not end in "3_2")."""
    before = stem.removesuffix(label)
    return before != stem and not (label[0].isdigit() and before[-1:].isdigit())


def _only_file(folder: Path) -> Path:
    files = checkpoint_files(folder)
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(
            f"'{folder}' holds {len(files)} checkpoint files ({listed([file.name for file in files])}): "
            "give the file itself, or a folder with rank_0, rank_1, .."
        )
    raise UserError(
        f"'{folder}' holds neither rank folders (rank_0, rank_1, ..) nor a checkpoint file: "
        "give the folder 'checkpoint' of the run"
    )
