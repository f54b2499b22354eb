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
ENDINGS = (".acc", ".log", ".json")
OWN = "split"  # what a gate tells of its layer alone
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
        return self.path(layer).is_file() and self.about(layer) == dict(about)

    def todo(self, layers: Sequence[int], about: Mapping[int, Mapping[str, Any]], overwrite: bool) -> tuple[int, ...]:
        """The layers that are left, with ``overwrite`` all; else gates of another request are refused, of any layer."""
        if overwrite:
            return tuple(layers)
        left = tuple(layer for layer in layers if not self.done(layer, about[layer]))
        others = [*(layer for layer in left if self.path(layer).exists()), *self.others(about)]
        if others:
            raise UserError(
                f"'{self.folder}' holds gates that were fitted otherwise (layer {others[0]}): choose another "
                "--save_path, or pass --overwrite"
            )
        return left

    def others(self, about: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """The layers beside those of ``about`` whose gates are of another request, or do not tell of which."""
        if not about:
            return []
        asked = common(next(iter(about.values())))
        return [layer for layer in self.layers() if layer not in about and common(self.about(layer)) != asked]

    def clear(self, layers: Sequence[int], about: Mapping[int, Mapping[str, Any]]) -> None:
        """Take away the gates of ``layers``, and of other requests: a model's gates are those of one."""
        for layer in (*layers, *self.others(about)):
            for ending in ("", *ENDINGS):
                self.path(layer, ending).unlink(missing_ok=True)

    def layers(self) -> list[int]:
        """The layers whose gates are there."""
        before, _, behind = self.template.partition("{}")
        numbers = (
            path.name[len(before) : len(path.name) - len(behind)] for path in self.folder.glob(f"{before}*{behind}")
        )
        return sorted(int(number) for number in numbers if number.isdecimal())

    def about(self, layer: int) -> Mapping[str, Any]:
        """What a layer's gate was fitted to; empty where nobody tells."""
        path = self.path(layer, ".json")
        found = read_object(path).get("about") if path.is_file() else None
        return found if isinstance(found, dict) else {}

    def write(
        self, layer: int, weights: Mapping[str, np.ndarray], figures: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """All files of a layer; the gate itself comes last, so that what is of it is known where it is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(layer).unlink(missing_ok=True)
        acc = {"best_acc": figures["recall"], "best_loss": figures["loss"], "save_epoch": figures["epoch"]}
        write_text(self.path(layer, ".acc"), "".join(f"{name}: {_short(value)}\n" for name, value in acc.items()))
        curve = figures["curve"]
        lines = [f"{name}: [{', '.join(map(_short, curve[name]))}]\n" for name in LISTS]
        write_text(self.path(layer, ".log"), "".join(lines))
        write_text(self.path(layer, ".json"), json.dumps({"about": about, "layer": layer, **figures}) + "\n")
        write_numbers(self.path(layer), dict(weights), overwrite=True)

    def figures(self) -> list[dict[str, Any]]:
        """What was measured of every layer that is there, in their order."""
        paths = (self.path(layer, ".json") for layer in self.layers())
        return [dict(read_object(path)) for path in paths if path.is_file()]


def common(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the gates of one request have in common."""
    return {key: value for key, value in about.items() if key != OWN}


def check_together(folder: Path, template: str, splits: Mapping[int, str]) -> None:
    """What the gates of a model tell must be one request, fitted to the splits with these marks.

    Raises:
        UserError: they are of several requests, or of other splits. Gates of another tool tell nothing.
    """
    files = GateFiles(folder, template)
    told = {layer: files.about(layer) for layer in splits if files.about(layer)}
    wrong = [layer for layer, about in told.items() if about.get(OWN) != splits[layer]]
    if wrong:
        raise UserError(
            f"'{folder}' holds gates that were fitted to another split than --split_file_path (layers {wrong}): fit "
            "them to this one (select --overwrite)"
        )
    first = next(iter(told), 0)
    apart = [layer for layer, about in told.items() if common(about) != common(told[first])]
    if apart:
        raise UserError(
            f"'{folder}' holds gates of layers {apart} that were fitted otherwise than that of layer {first}: fit all "
            "with the same options (select --overwrite)"
        )


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
