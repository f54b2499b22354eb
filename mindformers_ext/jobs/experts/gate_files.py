# SPDX-License-Identifier: Apache-2.0
"""Fitted gates on disk: a state dict per layer, the seed's two text files beside it, and what was measured as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.engine.door import read_numbers, write_numbers

SUMMARY = "select.json"
LISTS = ("train_epochs", "train_loss", "train_acc", "valid_epochs", "valid_loss", "valid_acc")
NAMES = {"mlp": "MLP", "linear": "Linear", "ridge": "Ridge"}


def gates_folder(save_path: Path, model: str, experts: int, kind: str) -> Path:
    """Where the gates of a model lie."""
    return save_path / f"{model}-{experts}Expert-Select-{NAMES[kind]}"


@dataclass(frozen=True)
class GateFiles:
    """The files of one layer's gate in ``folder``."""

    folder: Path
    template: str

    def path(self, layer: int, ending: str = "") -> Path:
        """The gate itself, or what stands beside it."""
        return self.folder / (self.template.format(layer) + ending)

    def done(self, layer: int, about: Mapping[str, Any]) -> bool:
        """Whether the gate of this very request is there."""
        path = self.path(layer, ".json")
        return self.path(layer).is_file() and path.is_file() and read_object(path).get("about") == dict(about)

    def todo(self, layers: Sequence[int], about: Mapping[int, Mapping[str, Any]], overwrite: bool) -> tuple[int, ...]:
        """The layers that are left, with ``overwrite`` all; else gates of another request are refused."""
        if overwrite:
            return tuple(layers)
        left = tuple(layer for layer in layers if not self.done(layer, about[layer]))
        others = [layer for layer in left if self.path(layer).exists()]
        if others:
            raise UserError(
                f"'{self.folder}' holds gates that were fitted otherwise (layer {others[0]}): choose another "
                "--save_path, or pass --overwrite"
            )
        return left

    def write(
        self, layer: int, weights: Mapping[str, np.ndarray], figures: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """All files of a layer; the JSON, by which ``done`` knows, comes last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(layer, ".json").unlink(missing_ok=True)
        write_numbers(self.path(layer), dict(weights), overwrite=True)
        acc = {"best_acc": figures["recall"], "best_loss": figures["loss"], "save_epoch": figures["epoch"]}
        write_text(self.path(layer, ".acc"), "".join(f"{name}: {_short(value)}\n" for name, value in acc.items()))
        curve = figures["curve"]
        lines = [f"{name}: [{', '.join(map(_short, curve[name]))}]\n" for name in LISTS]
        write_text(self.path(layer, ".log"), "".join(lines))
        write_text(self.path(layer, ".json"), json.dumps({"about": about, "layer": layer, **figures}) + "\n")

    def figures(self) -> list[dict[str, Any]]:
        """What was measured of every layer that is there, in their order."""
        before, _, behind = self.template.partition("{}")
        found = []
        for path in self.folder.glob(f"{before}*{behind}.json"):
            number = path.name[len(before) : -len(behind + ".json")]
            if number.isdecimal() and self.path(int(number)).is_file():
                found.append(read_object(path))
        return sorted(found, key=lambda one: int(one["layer"]))


def read_gates(
    folder: Path, template: str, layers: int, allow_pickle: bool = False
) -> dict[int, dict[str, np.ndarray]]:
    """The gates of a model's layers, tensors by their names below ``gate.``.

    Raises:
        UserError: no such folder, a layer that is missing, or a file that holds no tensors.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: give the one that select has written")
    files, gates = GateFiles(folder, template), {}
    missing = [layer for layer in range(layers) if not files.path(layer).is_file()]
    if missing:
        raise UserError(f"'{folder}' lacks the gates of layers {missing}: fit them (select --specify_layer ...)")
    for layer in range(layers):
        found = read_numbers(files.path(layer), allow_pickle)
        if not isinstance(found, dict) or not all(isinstance(item, np.ndarray) for item in found.values()):
            raise UserError(f"'{files.path(layer)}' holds no gate's tensors: fit it again")
        if not all(np.isfinite(item).all() for item in found.values()):
            raise UserError(f"'{files.path(layer)}' holds NaN or infinite values: fit it again")
        gates[layer] = found
    return gates


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
