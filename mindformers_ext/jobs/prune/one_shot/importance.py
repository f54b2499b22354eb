# SPDX-License-Identifier: Apache-2.0
"""The pass that measures every unit of a model, once: what a file holds already is not measured again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.pruning import ModelShape, shape_of_model
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.probe import Nothing, Sink, Tell, backward, check_needs, forward, needs
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.jobs.experts.texts import Ready
from mindformers_ext.jobs.prune.one_shot.importance_file import (
    Importance,
    provenance,
    read_importance_file,
    write_importance_file,
)
from mindformers_ext.jobs.prune.one_shot.measures import SINKS
from mindformers_ext.surgery.prune.importance import KINDS

VERSION = 1
TOLD = {
    "weights": "the weights of another model",
    "rows": "other calibration text",
    "engine": "another engine",
    "device_target": "another device",
    "version": "another version",
}


def about(start: Ready) -> dict[str, object]:
    """What decides the numbers."""
    return {"version": VERSION, "weights": fingerprint(start.model.reader), **start.about()}


def measured(start: Ready, path: Path, kinds: Sequence[str], remake: bool, tell: Tell) -> Importance:
    """What the file ``path`` holds of ``kinds`` (``surgery.prune.importance.KINDS``), measured now where it is not.

    A killed pass goes on where it was.

    Raises:
        UserError: the file is of another model or text, or damaged; too little memory or disk; a model that gives no
            numbers.
    """
    wanted = about(start)
    found = None if remake else _kept(path, wanted)
    missing = [kind for kind in kinds if found is None or kind not in found.kinds]
    folder = path.with_name(f".{path.name}.pass")
    if found is not None and not missing:
        remove_left(folder)
        tell(f"{path}: measured before (sha256 {provenance(wanted)[:12]}), used again")
        return found
    course, shape = start.measured, shape_of_model(start.model.spec)
    tell(f"measuring {course.rows.tokens} tokens in {len(course.rows.ids)} rows: {', '.join(missing)}")
    sinks: dict[str, Sink] = {
        kind: SINKS[kind](start.model, shape, partial(_layer_file, folder, kind)) for kind in missing
    }
    back = "taylor" in missing
    for sink in sinks.values():
        check_needs(needs(course, sink, shape.num_hidden_layers, backward=back), path.parent)
    digest = course.rows.digest(json.dumps({**wanted, "kinds": missing}, sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    states = States(folder, course.length, shape.hidden_size, digest, keep=back, anew=remake)
    layers = range(shape.num_hidden_layers)
    forward(course, states, sinks.get("forward", Nothing()), layers, keep_last=back)
    if back:
        backward(course, states, sinks["taylor"], layers)
    statistics = dict(found.statistics) if found else {}
    for kind in missing:
        statistics |= _joined(kind, folder, shape)
    wrong = [name for name, value in statistics.items() if not np.isfinite(value).all()]
    if wrong:
        states.remove()
        raise UserError(
            f"'{start.model.folder}' gives values that are no numbers ({', '.join(wrong)}): check its weights"
        )
    result = Importance(shape, statistics, wanted)
    write_importance_file(path, result)
    states.remove()
    return result


def _kept(path: Path, wanted: dict[str, object]) -> Importance | None:
    if not path.exists():
        return None
    found = read_importance_file(path)
    other = [TOLD.get(name, name) for name, value in wanted.items() if found.about.get(name) != value]
    if other:
        raise UserError(
            f"'{path}' was measured with {', '.join(other)} (sha256 {provenance(found.about)[:12]}, wanted "
            f"{provenance(wanted)[:12]}): choose another --importance file, or measure anew with --remake_importance"
        )
    return found


def _layer_file(folder: Path, kind: str, layer: int) -> Path:
    """What a pass has found of one layer."""
    return folder / f"{kind}_{layer}.npz"


def _joined(kind: str, folder: Path, shape: ModelShape) -> dict[str, np.ndarray]:
    """The layers' files as one array a name."""
    found: dict[str, list[np.ndarray]] = {}
    for layer in range(shape.num_hidden_layers):
        with np.load(_layer_file(folder, kind, layer), allow_pickle=False) as arrays:
            for name in arrays.files:
                found.setdefault(name, []).append(arrays[name])
    return {name: np.stack(values) if "L" in KINDS[kind][name] else values[-1] for name, values in found.items()}
