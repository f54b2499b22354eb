# SPDX-License-Identifier: Apache-2.0
"""The files that a YAML names and a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INPUTS = (
    "load_checkpoint",
    "src_strategy_path_or_dir",
    "train_dataset.data_loader.dataset_dir",
    "eval_dataset.data_loader.dataset_dir",
    "train_dataset_task.dataset_config.data_loader.dataset_dir",
    "eval_dataset_task.dataset_config.data_loader.dataset_dir",
    "processor.tokenizer.vocab_file",
    "processor.tokenizer.tokenizer_file",
)


def find_inputs(config: dict[str, Any], root: Path) -> None:
    """Set, in place, every input below ``root`` that is named by a relative path and is not below the current folder.

    So a YAML that comes with the repository finds the data that the repository's own commands made, from any folder.
    """
    for place in INPUTS:
        found: Any = config
        *sections, key = place.split(".")
        for section in sections:
            found = found.get(section) if isinstance(found, dict) else None
        name = found.get(key) if isinstance(found, dict) else None
        if not isinstance(name, str) or not name or Path(name).is_absolute() or Path(name).exists():
            continue
        if (root / name).exists():
            found[key] = str(root / name)
