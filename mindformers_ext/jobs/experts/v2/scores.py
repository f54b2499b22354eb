# SPDX-License-Identifier: Apache-2.0
"""Importance of each neuron on the tokens of each cluster, for Gradient Split Plus: |h * dL/dh|, its mean per cluster.

A token's cluster is the gate's row with the largest product; h is what enters down_proj, L the mean loss of the token's
row over its answers (over all tokens of a plain text), which is the published recipe with its batches of one. Every
token counts that is no padding, also where nothing is predicted. The measure is SNIP's (Lee et al. 2019,
arXiv:1810.02340) for neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import fresh_file, refuse_existing, write_text
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.folder_lock import locked
from mindformers_ext.jobs.experts.calibration import opened
from mindformers_ext.jobs.experts.probe import Nothing, Part, Tell, backward, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import Share, own_share
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.jobs.experts.v2.layer_tables import (
    GATE,
    GATES,
    SCORES,
    LayerTable,
    read_table,
    write_table,
)
from mindformers_ext.jobs.experts.v2.table_stage import TableRequest


@dataclass(frozen=True, kw_only=True)
class ScoresRequest(TableRequest):
    """What is asked for; ``gates``: the file whose rows make clusters of tokens."""

    KIND = SCORES
    gates: Path


class ScoreSink:
    """Sums |h * dL/dh| by the cluster of each token (``jobs.experts.probe.Sink``)."""

    values: tuple[str, ...] = ("mlp_input", "hidden")
    gradients: tuple[str, ...] = ("hidden",)

    def __init__(self, gates: Mapping[int, np.ndarray], width: int, place: Callable[[int], Path]) -> None:
        self._gates, self._place = gates, place
        clusters = len(next(iter(gates.values())))
        self._sums = np.zeros((clusters, width), np.float64)
        self._counts = np.zeros(clusters, np.int64)
        self.nbytes = self._sums.nbytes

    def take(
        self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]
    ) -> None:
        """Add a part's tokens."""
        cluster = (values["mlp_input"] @ self._gates[layer].T).argmax(1)
        change = np.abs(values["hidden"] * gradients["hidden"])
        member = (cluster == np.arange(len(self._sums))[:, None]).astype(np.float64)
        self._sums += member @ change
        self._counts += np.bincount(cluster, minlength=len(self._counts))

    def end(self, layer: int) -> None:
        """Keep the layer's sums."""
        with fresh_file(self._place(layer), overwrite=True) as beside, beside.open("wb") as file:
            np.savez(file, sums=self._sums, counts=self._counts)
        self._sums[:], self._counts[:] = 0, 0


def write_scores(request: ScoresRequest, tell: Tell = lambda line: None) -> LayerTable | None:
    """Write the file of scores; a killed run goes on where it was. With several processes each adds its rows' share,
    and the one that ends last writes the file: the others, and a dry run, return None.

    Raises:
        UserError: options, gates, texts or a model that do not fit; too little memory or disk; a file that exists.
    """
    request.check()
    share = own_share()
    refuse_existing(request.path, request.overwrite)
    table = read_table(request.gates, GATES)
    with opened(request.calibration, share, not request.dry_run) as start:
        spec, weights = start.model.spec, fingerprint(start.model.reader)
        table.check_made_from(model=weights)
        gates = _fitting(table, spec.num_hidden_layers, spec.hidden_size)
        folder, layers = request.save_path, range(spec.num_hidden_layers)
        sink = ScoreSink(gates, spec.intermediate_size, lambda layer: _partial(folder, share.rank, layer))
        course = replace(start.course, mean=True)
        wanted = needs(course, sink, len(layers), backward=True)
        for line in (
            *start.notes,
            f"{start.rows} rows, {start.tokens} tokens in {len(gates[0])} clusters; memory of a process about "
            f"{wanted.memory / 1e9:.2f} GB, for any number of layers; disk {wanted.disk / 1e9:.3f} GB while it runs",
        ):
            tell(line) if share.rank == 0 else None
        if request.dry_run:
            return None
        check_needs(wanted, folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"model": weights, GATES: table.digest, "texts": start.every.digest("")}
        noted = {**about, "computed": request.calibration.computed(), "ranks": share.size}
        ended, place = _ended(folder, share.rank), folder / f".states_{share.rank}"
        if request.overwrite or not ended.is_file() or read_object(ended) != noted:
            ended.unlink(missing_ok=True)
            digest = course.rows.digest(json.dumps(noted, sort_keys=True))
            states = States(place, course.length, spec.hidden_size, digest, keep=True, anew=request.overwrite)
            forward(course, states, Nothing(), (len(layers) - 1,), keep_last=True)
            backward(course, states, sink, layers)
            write_text(ended, json.dumps(noted) + "\n")
            states.remove()
        else:
            remove_left(place)  # killed behind its end
        return _combine(request, about, noted, layers, share, tell)


def _fitting(table: LayerTable, layers: int, width: int) -> dict[int, np.ndarray]:
    missing = [layer for layer in range(layers) if layer not in table.layers]
    if missing:
        raise UserError(f"'{table.path}' lacks layers {missing}: give the gates of this model")
    gates = {layer: table.layers[layer][GATE] for layer in range(layers)}
    shape = (len(gates[0]), width)
    wrong = next((layer for layer, gate in gates.items() if gate.shape != shape), None)
    if wrong is not None:
        raise UserError(f"'{table.path}', layer {wrong}: found {list(gates[wrong].shape)}, expected {list(shape)}")
    return gates


def _partial(folder: Path, rank: int, layer: int) -> Path:
    return folder / f".scores_{rank}_{layer}.npz"


def _ended(folder: Path, rank: int) -> Path:
    return folder / f".scores_{rank}.json"


def _combine(
    request: ScoresRequest, about: Mapping[str, Any], noted: Mapping[str, Any], layers: range, share: Share, tell: Tell
) -> LayerTable | None:
    """Add all processes' sums, in the order of their ranks, once all have ended."""
    folder = request.save_path
    with locked(folder):
        ended = [_ended(folder, rank) for rank in range(share.size)]
        if any(not path.is_file() or read_object(path) != noted for path in ended):
            return None
        scores: dict[int, dict[str, np.ndarray]] = {}
        for layer in layers:
            sums, counts = 0.0, 0
            for rank in range(share.size):
                with np.load(_partial(folder, rank, layer), allow_pickle=False) as part:
                    sums, counts = sums + part["sums"], counts + part["counts"]
            means = (np.asarray(sums) / np.maximum(counts, 1)[:, None]).astype(np.float32)
            scores[layer] = {str(cluster): row for cluster, row in enumerate(means)}
            empty = np.flatnonzero(np.asarray(counts) == 0).tolist()
            if empty:
                tell(f"warning: layer {layer}: clusters {empty} have no token, their scores are 0")
        table = LayerTable(SCORES, scores, about, request.path)
        write_table(request.path, table, request.overwrite)
        for path in folder.glob(".scores_*"):
            path.unlink()
        return table
