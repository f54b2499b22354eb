# SPDX-License-Identifier: Apache-2.0
"""Which layers can be left out: one after the other the one without which the loss is lowest (SLEB, Song et al. 2024,
arXiv:2402.09025, section 3). The order is kept in a file, so that fewer layers later cost nothing and more go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.jobs.experts.probe import Course, Tell, embed, mean_losses, pass_on
from mindformers_ext.jobs.experts.states import States
from mindformers_ext.jobs.prune.one_shot.importance_file import provenance


@dataclass(frozen=True)
class Order:
    """Layers in the order in which they go, and the loss after each has gone."""

    layers: tuple[int, ...]
    losses: tuple[float, ...]


def removal_order(
    course: Course,
    path: Path,
    about: Mapping[str, object],
    count: int,
    folder: Path,
    remake: bool,
    tell: Tell,
) -> Order:
    """The first ``count`` layers to go. ``path``: the file of the order, ``about``: of which model and text it is,
    ``folder``: a scratch folder.

    Raises:
        UserError: the file is of another model or text.
    """
    whole = dict(about) | {"rows": course.rows.digest("")}
    order = Order((), ()) if remake or not path.exists() else _read(path, whole, course.model.spec.num_hidden_layers)
    if order.layers:
        tell(f"{path}: {len(order.layers)} layers were ordered before, used again")
    while len(order.layers) < count:
        left = [layer for layer in range(course.model.spec.num_hidden_layers) if layer not in order.layers]
        losses = losses_without(course, left, folder)
        best = min(left, key=lambda layer: (losses[layer], layer))
        order = Order((*order.layers, best), (*order.losses, losses[best]))
        text = {"about": whole, "sha256": provenance(whole), "layers": order.layers, "losses": order.losses}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(text, indent=1) + "\n")
    return Order(order.layers[:count], order.losses[:count])


def _read(path: Path, about: Mapping[str, object], layers: int) -> Order:
    found = read_object(path)
    if found.get("about") != dict(about) or found.get("sha256") != provenance(about):
        raise UserError(
            f"'{path}' is the order of another model's layers, or on other text: choose another --importance file, or "
            "measure anew with --remake_importance"
        )
    order, losses = found.get("layers"), found.get("losses")
    whole = (
        isinstance(order, list) and isinstance(losses, list) and len(order) == len(losses) == len({*map(str, order)})
    )
    if not whole or not all(type(n) is int and 0 <= n < layers for n in order or ()):
        raise UserError(f"'{path}' is no order of {layers} layers: measure anew with --remake_importance")
    return Order(tuple(order or ()), tuple(float(loss) for loss in losses or ()))


def losses_without(course: Course, left: Sequence[int], folder: Path) -> dict[int, float]:
    """The mean loss of the layers ``left`` without each of them in turn. A layer is in memory once."""
    width, length = course.model.spec.hidden_size, course.length
    probe = course.open()
    whole = States(folder / "whole", length, width, "whole", keep=False)
    ways: dict[int, States] = {}
    try:
        embed(course, whole)
        with tqdm(total=len(left), desc=f"{len(left)} layers", unit="layer", disable=course.quiet or None) as bar:
            for place, layer in enumerate(left):
                probe.fill(layer, course.model.layer(layer))
                for way in ways.values():
                    pass_on(course, probe, place, way, way)
                ways[layer] = States(folder / str(layer), length, width, str(layer), keep=False)
                pass_on(course, None, place, whole, ways[layer])
                pass_on(course, probe, place, whole, whole)
                bar.update()
        return dict(zip(ways, mean_losses(course, probe, ways.values(), len(left)), strict=True))
    finally:
        for way in (whole, *ways.values()):
            way.remove()
