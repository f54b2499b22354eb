# SPDX-License-Identifier: Apache-2.0
"""Files beside a model that are copied with it: those of its own folder, not what links there lead to elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

SNAPSHOTS = "snapshots"  # of a hub's cache, whose snapshots are links into the repository's own folder


def lies_inside(folder: Path, name: str) -> bool:
    """Whether ``folder / name`` is a file of the folder itself, through links or not.

    In a download of the hub (``models--OWNER--NAME/snapshots/COMMIT``) the whole repository's folder counts.
    """
    home = folder.resolve()
    root = home.parents[1] if home.parent.name == SNAPSHOTS and len(home.parents) > 1 else home
    return (folder / name).is_file() and root in (folder / name).resolve().parents


def copy_companions(source: Path, target: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Copy those of ``names`` that ``source`` has to ``target``.

    Returns the copied ones and those left out, as links that lead out of the folder.
    """
    there = [name for name in names if (source / name).is_file()]
    inside = [name for name in there if lies_inside(source, name)]
    for name in inside:
        shutil.copyfile(source / name, target / name)
    return inside, [name for name in there if name not in inside]


def left_out(source: Path, names: list[str]) -> list[str]:
    """A note about links that were not followed, none where there are none."""
    if not names:
        return []
    return [f"not copied, as links out of '{source}': {', '.join(names)}; put the files themselves there"]
