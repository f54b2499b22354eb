# SPDX-License-Identifier: Apache-2.0
"""What a pruning has come to: expected sizes against the target, what was kept, how many weights are left."""

from __future__ import annotations

from typing import Any

import numpy as np

from mindformers_ext.core.pruning import ModelShape
from mindformers_ext.jobs.prune.masks_file import SHAPE_FIELDS, SavedMasks
from mindformers_ext.surgery.prune.cut import FullMasks

REPORT = "pruning.json"
REFUSED, WARNED = 0.05, 0.01  # largest distances of an expected sparsity from the target


class NotReachedError(Exception):
    """The masks have not come to the target's shape."""


def check_reached(masks: SavedMasks, force: bool) -> list[str]:
    """Notes about what has not quite come to the target.

    Raises:
        NotReachedError: a module is too far from it, and nobody insists (``force``).
    """
    gaps = masks.gaps()
    far = [f"{name} by {gap:.4f}" for name, gap in gaps.items() if gap > REFUSED]
    if far and not force:
        raise NotReachedError(
            f"the expected sparsity is off the target: {', '.join(far)} (at most {REFUSED}): train longer or with a "
            "larger lag_lr, or insist with --force, which cuts what the model still uses"
        )
    near = [f"{name} by {gap:.4f}" for name, gap in gaps.items() if gap > WARNED]
    return [f"the expected sparsity is off the target: {', '.join(near)}"] if near else []


def rows_of(masks: SavedMasks) -> list[dict[str, Any]]:
    """By module: units, how many are kept in every layer, expected and wanted sparsity, the soft values kept."""
    found = []
    for name, value in masks.values.items():
        rows = np.atleast_2d(value)
        kept = rows[rows != 0]
        counts = np.count_nonzero(rows, 1)
        found.append(
            {
                "module": name,
                "units": rows.shape[1],
                "kept": sorted({int(count) for count in counts}),
                "expected_sparsity": float(masks.expected[name].mean()) if masks.expected else None,
                "target_sparsity": 1.0 - masks.target.units(name) / masks.source.units(name) if masks.target else None,
                "gap": masks.gaps().get(name),
                "soft_min": float(kept.min()) if kept.size else None,
                "soft_mean": float(kept.mean()) if kept.size else None,
            }
        )
    return found


def table(masks: SavedMasks) -> list[str]:
    """The same as lines for people."""
    lines = ["module          units  kept         expected   target      gap"]
    for row in rows_of(masks):
        kept = ", ".join(map(str, row["kept"]))
        numbers = [f"{row[key]:9.4f}" if row[key] is not None else "        -" for key in
                   ("expected_sparsity", "target_sparsity", "gap")]  # fmt: skip
        lines.append(f"{row['module']:<14} {row['units']:6}  {kept:<11} {numbers[0]} {numbers[1]} {numbers[2]}")
    return lines


def pruning_report(saved: SavedMasks, full: FullMasks, shape: ModelShape, weights: tuple[int, int]) -> dict[str, Any]:
    """Everything, as JSON: also the kept indices, by layer where layers differ, and the layers' old numbers."""
    kept: dict[str, Any] = {}
    for name, value in saved.values.items():
        rows = [np.flatnonzero(row).tolist() for row in np.atleast_2d(value)]
        kept[name] = rows if value.ndim > 1 else rows[0]
    return {
        "source": {name: getattr(saved.source, name) for name in SHAPE_FIELDS},
        "pruned": {name: getattr(shape, name) for name in SHAPE_FIELDS},
        "modules": rows_of(saved),
        "layers": full.kept_layers,
        "kept": kept,
        "parameters": {"before": weights[0], "after": weights[1]},
    }
