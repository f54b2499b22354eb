# SPDX-License-Identifier: Apache-2.0
"""Split folders: a file per layer, named by the template, and ``split_meta.json`` beside them (docs/formats.md).

A layer's file is a list with the expert of each neuron or, where neurons are shared, left out or in residual experts, a
list of neurons per expert, the residual experts first. ``torch.load`` reads it by its default.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext import __version__
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.folder_lock import locked
from mindformers_ext.jobs.engine.door import read_numbers, write_numbers
from mindformers_ext.jobs.experts.dense_model import template_kind
from mindformers_ext.surgery.experts.split import LayerSplit

META = "split_meta.json"
VERSION = 1
GRAPH_PARTS = "gp_split"  # folder in that of a graph split, whose own files are graphs
OTHER_ENDS = ("", "-l2", "-cos")  # what later versions of the reference put behind a clustering's folder


def layer_file(folder: Path, template: str, layer: int) -> Path:
    """The file of one layer: ``template`` with its number."""
    template_kind(template)
    return folder / template.format(layer)


def find_split_folder(path: Path) -> Path:
    """``path``, or the same name with or without the metric behind it, as versions of the reference differ.

    Raises:
        UserError: there is none.
    """
    name = re.sub(r"-(l2|cos)$", "", path.name)
    for found in (path, *(path.with_name(name + end) for end in OTHER_ENDS)):
        if found.is_dir():
            return found / GRAPH_PARTS if (found / GRAPH_PARTS).is_dir() else found
    raise UserError(f"split folder '{path}' does not exist: run split first, or correct --split_file_path")


def open_split(
    folder: Path,
    template: str,
    layer: int,
    experts: int | None = None,
    allow_pickle: bool = False,
    width: int | None = None,
) -> LayerSplit:
    """The split of one layer; every form of file that the reference has written is read.

    experts: how many there must be, without residual ones; None takes what the file has. width: neurons of the layer;
    None takes what ``split_meta.json`` or the file says. allow_pickle: also files with numpy's numbers, as the
    reference has written them (no code of a file is run).

    Raises:
        UserError: no such folder or file, one that is no split, or one of other sizes.
    """
    folder = find_split_folder(folder)
    path = layer_file(folder, template, layer)
    if not path.is_file():
        raise UserError(f"'{folder}' holds no '{path.name}': split layer {layer} first (split --specify_layer {layer})")
    settings = read_meta(folder).get("settings", {})
    value = read_numbers(path, allow_pickle)
    try:
        split = _from_file(value, settings, experts, width)
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{path}': {error}") from error
    if experts is not None and len(split.experts) != experts:
        raise UserError(f"'{path}' has {len(split.experts)} experts, --num_experts is {experts}: correct one of them")
    if width is not None and split.width != width:
        raise UserError(
            f"'{path}' is of a layer of {split.width} neurons, the model has {width}: give this model's split"
        )
    return split


def read_splits(
    folder: Path, template: str, layers: int, experts: int | None, allow_pickle: bool, width: int
) -> dict[int, LayerSplit]:
    """The splits of a model's layers; see ``open_split``."""
    return {layer: open_split(folder, template, layer, experts, allow_pickle, width) for layer in range(layers)}


def _from_file(value: Any, settings: Mapping[str, Any], experts: int | None, width: int | None) -> LayerSplit:
    is_lists = isinstance(value, list) and bool(value) and isinstance(value[0], list | np.ndarray)
    if is_lists or isinstance(value, np.ndarray) and value.ndim == 2:
        lists = tuple(np.asarray(ids, np.int64) for ids in value)
        residual = int(settings.get("num_residual", 0))
        if experts is not None and not settings:
            residual = max(len(lists) - experts, 0)
        every = np.concatenate(lists)
        known = int(settings.get("intermediate_size", 0)) or width or int(every.max(initial=-1)) + 1
        return LayerSplit(known, lists[residual:], lists[:residual])
    if not isinstance(value, list | np.ndarray) or not len(value):
        raise UserError("holds neither a label per neuron nor lists of neurons: split the layer again")
    labels = np.asarray(value)
    known = experts or int(settings.get("num_experts", 0)) or int(labels.max()) + 1
    return LayerSplit.from_labels(labels, known)


def read_meta(folder: Path) -> dict[str, Any]:
    """``split_meta.json``; empty where there is none, as in the reference's folders."""
    path = folder / META
    if not path.is_file():
        return {}
    found = read_object(path, "split again with --overwrite")
    if not isinstance(found.get("settings"), dict) or not isinstance(found.get("layers"), dict):
        raise UserError(f"'{path}' is no description of a split: split again with --overwrite")
    return dict(found)


def write_split(
    folder: Path, template: str, layer: int, split: LayerSplit, settings: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Enter one layer in ``split_meta.json``, then write its file: where that stands, it is known whose it is. Other
    processes may do the same for other layers.

    settings: what all layers have in common. about: what is said of this one.
    """
    lists = [ids.tolist() for ids in (*split.residual, *split.experts)]
    is_labels = split.is_partition and not split.residual
    layer_file(folder, template, layer).unlink(missing_ok=True)
    with locked(folder):
        meta = read_meta(folder)
        layers = meta.get("layers", {}) if meta.get("settings") == dict(settings) else {}
        layers[str(layer)] = {
            "sizes": list(split.sizes),
            **({"residual_sizes": list(split.residual_sizes)} if split.residual else {}),
            **about,
            "split_sha256": split_sha(split),
        }
        ordered = dict(sorted(layers.items(), key=lambda item: int(item[0])))
        text = {"version": VERSION, "tool": f"mindformers_ext {__version__}", "settings": settings, "layers": ordered}
        write_text(folder / META, json.dumps(text, indent=1) + "\n")
    write_numbers(layer_file(folder, template, layer), split.labels().tolist() if is_labels else lists, overwrite=True)


def split_sha(split: LayerSplit) -> str:
    """sha256 of the lists of neurons."""
    digest = hashlib.sha256()
    for ids in (*split.residual, *split.experts):
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    return digest.hexdigest()
