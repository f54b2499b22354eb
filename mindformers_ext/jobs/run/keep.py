# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves in its folder: which checkpoints stay, what the adapters were, what it was asked to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.core.config.lora import ADAPTER_CONFIG, LoraSpec
from mindformers_ext.core.config.run import TRAINING, RunSpec
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.checkpoint.saved import last_whole

WEIGHTS = ("model.", "lm_head.")  # of the network; the step's and the optimizer's own state has other names


def keep_config(config: Mapping[str, Any], folder: Path) -> Path:
    """What the run was asked to do: ``<folder>/run_config/<run_mode>.yaml``."""
    path = folder / "run_config" / f"{config.get('run_mode')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_yaml(dict(config)))
    return path


def kept_config(folder: Path, mode: str) -> Path | None:
    """What ``keep_config`` has kept of the last run of this ``run_mode``, None where there is nothing."""
    path = folder / "run_config" / f"{mode}.yaml"
    return path if path.is_file() else None


def run_folders(place: Path) -> list[Path]:
    """Where files of a run's own folder may lie that has saved the weights ``place``: there, or above. Its checkpoints
    are ``checkpoint/rank_R/FILE``."""
    return [place, *place.resolve().parents][:4]


def kept_above(place: Path, mode: str) -> Path | None:
    """``kept_config`` of the run that has saved ``place``; of the other way to train where ``mode`` has left none."""
    found = (kept_config(folder, kind) for folder in run_folders(place) for kind in (mode, *TRAINING))
    return next(filter(None, found), None)


def keep_text(path: Path, text: str) -> None:
    """A text that the user has named a place for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def keep_lora(lora: LoraSpec | None, folder: Path, run: RunSpec) -> None:
    """What ``tools/merge_lora.py`` and a resumed run must know about the adapters, in PEFT's words."""
    if lora:
        folder.mkdir(parents=True, exist_ok=True)
        base = run.base if run.resume else run.load
        words = lora.peft_words(str(Path(base).resolve()) if base else None)
        write_text(folder / ADAPTER_CONFIG, json.dumps(words, indent=1) + "\n")


def surplus(files: Iterable[Path], keep: int, newest: Path) -> list[Path]:
    """The oldest ``files`` above the number ``keep`` (0: all stay), by time of writing; never the ``newest``."""
    held = sorted(files, key=lambda path: path.stat().st_mtime)
    too_many = max(0, len(held) - keep) if keep else 0
    return [path for path in held[:too_many] if path != newest]


def last_good(folder: Path, suffix: str = ".ckpt") -> str:
    """The newest whole checkpoint of a rank's folder, as a sentence."""
    found = last_whole(folder, suffix)
    return f"The last good checkpoint is {found.path} (step {found.label})." if found else "No checkpoint exists."


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or NaN: float64 holds any sum of float32 values, so one sum tells."""
    with np.errstate(invalid="ignore"):  # of infinities with both signs
        return bool(np.isfinite(np.sum(values, dtype=np.float64)))
