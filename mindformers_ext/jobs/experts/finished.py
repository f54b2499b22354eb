# SPDX-License-Identifier: Apache-2.0
"""Which stages of ``run`` are finished: a JSON file in the folder that they share, stage -> digest of its options.

A stage that has begun where nothing stood is noted under BEGUN: what stands there after a kill is its own, perhaps
without what it writes beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.folder_lock import locked

DONE = "experts_run.json"
BEGUN = "begun"


def note_done(folder: Path, stage: str, digest: str) -> None:
    """Enter that a stage with these options is finished."""
    _note(folder, {stage: digest, BEGUN: None})


def note_begun(folder: Path, stage: str, digest: str) -> None:
    """Enter that a stage with these options begins, and that nothing stands where it writes."""
    _note(folder, {BEGUN: [stage, digest]})


def note_ended(folder: Path) -> None:
    """Enter that the stage that had begun has ended without a result."""
    _note(folder, {BEGUN: None})


def has_begun(folder: Path, stage: str, digest: str) -> bool:
    """Whether a killed run of these options had begun the stage where nothing stood."""
    return _known(folder).get(BEGUN) == [stage, digest]


def is_done(folder: Path, stage: str, digest: str) -> bool:
    """Whether the stage was finished with these options."""
    return _known(folder).get(stage) == digest


def _known(folder: Path) -> dict[str, Any]:
    path = folder / DONE
    return dict(read_object(path)) if path.is_file() else {}


def _note(folder: Path, entries: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        known = {key: value for key, value in (_known(folder) | dict(entries)).items() if value is not None}
        write_text(folder / DONE, json.dumps(known, indent=1) + "\n")
