# SPDX-License-Identifier: Apache-2.0
"""Carved layers on disk until the mixture is written: a file each, with the digest of all that decided it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import shared_file
from mindformers_ext.surgery.experts.carve.carved import CarvedLayer
from mindformers_ext.surgery.experts.carve.choose import Linear, Threshold
from mindformers_ext.surgery.experts.split import LayerSplit

ABOUT, DOWN, ROUTER, ROUTER_BIAS, PART = "about", "down_proj", "router", "router_bias", "experts.{}"


@dataclass(frozen=True)
class LayerFiles:
    """The files in ``folder``."""

    folder: Path
    digest: str

    def path(self, layer: int) -> Path:
        """The file of one layer."""
        return self.folder / f"layer_{layer}.npz"

    def write(self, layer: int, carved: CarvedLayer) -> None:
        """Write a layer whole, in place of an older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        split = carved.split
        about = {"digest": self.digest, "layer": layer, "width": split.width, "figures": dict(carved.figures)}
        about |= {"experts": len(split.experts), "shared": len(split.residual)}
        arrays: dict[str, Any] = {ABOUT: np.array(json.dumps(about)), DOWN: carved.down}
        arrays |= {PART.format(place): ids for place, ids in enumerate((*split.experts, *split.residual))}
        if isinstance(carved.chooser, Linear | Threshold):
            arrays[ROUTER] = carved.chooser.rows
        if isinstance(carved.chooser, Threshold):
            arrays[ROUTER_BIAS] = carved.chooser.bias
        with shared_file(self.path(layer)) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)

    def is_done(self, layer: int) -> bool:
        """Whether the layer's file is that of this request."""
        try:
            return bool(self._about(layer)["digest"] == self.digest)
        except UserError:
            return False

    def figures(self, layer: int) -> Mapping[str, float]:
        """What was said of the layer."""
        found: dict[str, float] = self._about(layer)["figures"]
        return found

    def split(self, layer: int) -> LayerSplit:
        """The layer's experts."""
        about = self._about(layer)
        parts = [self.array(layer, PART.format(place)) for place in range(about["experts"] + about["shared"])]
        return LayerSplit(about["width"], tuple(parts[: about["experts"]]), tuple(parts[about["experts"] :]))

    def array(self, layer: int, name: str) -> np.ndarray:
        """DOWN (D, F), ROUTER (E, D), of a threshold ROUTER_BIAS (E), or the neurons of an expert.

        Raises:
            UserError: the file is damaged, or lacks it.
        """
        try:
            with np.load(self.path(layer), allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"'{self.path(layer)}' is damaged ({error}): remove its folder and carve again") from error

    def _about(self, layer: int) -> dict[str, Any]:
        try:
            found = json.loads(str(self.array(layer, ABOUT)[()]))
            return {key: found[key] for key in ("digest", "width", "figures", "experts", "shared")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{self.path(layer)}' is damaged: remove its folder and carve again") from error
