# SPDX-License-Identifier: Apache-2.0
"""Which stages of ``run`` are finished: a JSON file in the folder that they share, stage -> digest of its options."""

from __future__ import annotations

import json
from pathlib import Path

from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.folder_lock import locked

DONE = "experts_run.json"


def note_done(folder: Path, stage: str, digest: str) -> None:
    """Enter that a stage with these options is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        known = read_object(folder / DONE) if (folder / DONE).is_file() else {}
        write_text(folder / DONE, json.dumps(known | {stage: digest}, indent=1) + "\n")


def is_done(folder: Path, stage: str, digest: str) -> bool:
    """Whether the stage was finished with these options."""
    path = folder / DONE
    return path.is_file() and read_object(path).get(stage) == digest
