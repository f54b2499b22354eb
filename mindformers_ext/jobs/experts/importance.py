# SPDX-License-Identifier: Apache-2.0
"""How much the language model's loss feels each neuron, per cluster of like texts: data for the gradient split.

For each token v = h * dL/dh ("feature_change") or dL/dh ("feature_grad"), L the loss summed over the predicted tokens;
h is what enters down_proj (file key up_proj) or what leaves gate_proj (file key gate_proj). SNIP's measure (Lee et al.
2019, arXiv:1810.02340) for neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import fresh_file, write_text
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.folder_lock import locked
from mindformers_ext.jobs.engine.door import write_numbers
from mindformers_ext.jobs.experts.calibration import Calibration, Opened, opened
from mindformers_ext.jobs.experts.importance_scores import META
from mindformers_ext.jobs.experts.probe import Nothing, Part, backward, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import Share, own_share
from mindformers_ext.jobs.experts.states import States, remove_left
from mindformers_ext.surgery.experts.words import KERNELS

LEVELS = ("sample", "total")  # the kernel of each token's value, or of their sum
TYPES = {"feature_grad": "grad", "feature_change": "change"}  # and how their files end
POINTS = {"up_proj": "hidden", "gate_proj": "gate_linear"}


@dataclass(frozen=True, kw_only=True)
class ImportanceRequest:
    """What is asked for."""

    calibration: Calibration
    save_path: Path
    clusters: int = 16
    kernel: str = "l1_norm"
    level: str = "sample"
    kind: str = "feature_change"
    layers: tuple[int, ...] | None = None
    overwrite: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """``UserError`` lists options that do not fit."""
        problems = Problems("options")
        problems.positive("--num_clusters", self.clusters)
        problems.one_of("--kernel", self.kernel, tuple(KERNELS))
        problems.one_of("--accumulate_level", self.level, LEVELS)
        problems.one_of("--importance_type", self.kind, tuple(TYPES))
        problems.raise_if_any()
        self.calibration.check()


@dataclass(frozen=True)
class ImportanceReport:
    """Where the vectors are. ``whole``: they are complete; False while other processes are still at work."""

    folder: Path
    rows: tuple[int, ...]
    whole: bool


class ImportanceSink:
    """Sums what a way back gives, per cluster, and keeps a layer's sums in a file (``jobs.experts.probe.Sink``).

    ``clusters``: the cluster of each row of this process.
    """

    values: tuple[str, ...] = tuple(POINTS.values())
    gradients: tuple[str, ...] = tuple(POINTS.values())

    def __init__(
        self, request: ImportanceRequest, clusters: np.ndarray, width: int, place: Callable[[int], Path]
    ) -> None:
        self._clusters, self._place = clusters, place
        self._kernel = KERNELS[request.kernel] if request.level == "sample" else KERNELS["plain"]
        self._changes = request.kind == "feature_change"
        self._sums = np.zeros((len(POINTS), request.clusters, width), np.float64)
        self.nbytes = self._sums.nbytes

    def take(
        self, layer: int, part: Part, values: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]
    ) -> None:
        """Add a part's tokens to the sums of their rows' clusters."""
        clusters = self._clusters[part.rows]
        for number, point in enumerate(POINTS.values()):
            change = gradients[point] * values[point] if self._changes else gradients[point]
            for cluster in np.unique(clusters):
                chosen = change if (clusters == cluster).all() else change[clusters == cluster]
                self._sums[number, cluster] += self._kernel(chosen).sum(0, dtype=np.float64)

    def end(self, layer: int) -> None:
        """Keep the layer's sums."""
        with fresh_file(self._place(layer), overwrite=True) as beside, beside.open("wb") as file:
            np.save(file, self._sums)
        self._sums[:] = 0


def importance_folder(request: ImportanceRequest, model: str) -> Path:
    """Where the vectors lie, in the reference's words."""
    name = f"{model}-Gradients-{request.kernel}-{request.level}-{request.kind}"
    return request.save_path / f"Gradients{request.clusters}" / name


def write_importance(request: ImportanceRequest, tell: Callable[[str], object] = lambda line: None) -> ImportanceReport:
    """Write a vector (F) per cluster, layer and key. A killed run goes on where it was.

    With several processes each adds its rows' share; the one that ends last writes the vectors.

    Raises:
        UserError: options, texts or a model that do not fit; too little memory or disk; others in the folder.
    """
    request.check()
    share = own_share()
    with opened(request.calibration, share, not request.dry_run) as start:
        layers = start.model.check_layers(request.layers)
        clusters = _clusters(request, start)
        counts = tuple(int(count) for count in np.bincount(clusters, minlength=request.clusters))
        folder = importance_folder(request, start.model.name)
        about = _about(request, start, layers, share)
        if _is_there(folder, about, request.overwrite):
            _remove_left(folder, share) if not request.dry_run else None
            return ImportanceReport(folder, counts, True)
        width = start.model.spec.intermediate_size
        own = clusters[share.rank :: share.size]
        sink = ImportanceSink(request, own, width, lambda layer: _partial(folder, share.rank, layer))
        wanted = needs(start.course, sink, start.model.spec.num_hidden_layers, backward=True)
        for line in (
            *start.notes,
            f"{start.rows} rows, {start.tokens} tokens in {request.clusters} clusters of {min(counts)} to "
            f"{max(counts)} rows; memory of a process about {wanted.memory / 1e9:.2f} GB, for any number of layers; "
            f"disk {wanted.disk / 1e9:.3f} GB while it runs",
        ):
            tell(line) if share.rank == 0 else None
        if request.dry_run:
            return ImportanceReport(folder, counts, False)
        check_needs(wanted, folder, 0)
        folder.mkdir(parents=True, exist_ok=True)
        if request.overwrite:
            _clear(folder, share)
        digest = start.course.rows.digest(json.dumps(about, sort_keys=True) + own.tobytes().hex())
        spec = start.model.spec
        place = folder / f".states_{share.rank}"
        states = States(place, start.course.length, spec.hidden_size, digest, keep=True, anew=request.overwrite)
        forward(start.course, states, Nothing(), (spec.num_hidden_layers - 1,), keep_last=True)
        backward(start.course, states, sink, layers)
        predicted = np.bincount(own, np.maximum(start.course.rows.lengths - 1, 0), request.clusters)
        write_text(_finished(folder, share.rank), json.dumps({"about": about, "tokens": predicted.tolist()}) + "\n")
        states.remove()
        whole = _combine(request, folder, about, layers, share)
        return ImportanceReport(folder, counts, whole)


def _clusters(request: ImportanceRequest, start: Opened) -> np.ndarray:
    """The cluster of each row of all processes."""
    from mindformers_ext.surgery.experts.text_clusters import kmeans, tfidf

    rows = start.every
    if len(rows.ids) < request.clusters:
        raise UserError(
            f"{len(rows.ids)} rows of text for {request.clusters} clusters: give more text, a smaller --block_size or "
            "fewer --num_clusters"
        )
    if request.clusters == 1:
        return np.zeros(len(rows.ids), np.int64)
    texts = [row[:length] for row, length in zip(rows.ids, rows.lengths, strict=True)]
    return kmeans(tfidf(texts), request.clusters, request.calibration.seed)


def _about(request: ImportanceRequest, start: Opened, layers: tuple[int, ...], share: Share) -> dict[str, Any]:
    return {
        "model": start.model.name,
        "weights": fingerprint(start.model.reader),
        "rows": start.every.digest(""),
        "clusters": request.clusters,
        "kernel": request.kernel,
        "level": request.level,
        "type": request.kind,
        "layers": list(layers),
        "ranks": share.size,
        "seed": request.calibration.seed,  # of the clusters
        **request.calibration.computed(),
    }


def _is_there(folder: Path, about: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the vectors need not be made; others are refused."""
    path = folder / META
    if overwrite or not path.is_file():
        return False
    found = read_object(path).get("about", {})
    same = {key: value for key, value in about.items() if key != "ranks"}
    if {key: value for key, value in found.items() if key != "ranks"} == same:
        return True
    raise UserError(
        f"'{folder}' holds others (another model, text, engine or device): choose another --save_path, or --overwrite"
    )


def _remove_left(folder: Path, share: Share) -> None:
    """Delete what processes left that were killed when the vectors were there."""
    remove_left(folder / f".states_{share.rank}")
    with locked(folder):
        for path in folder.glob(".sums_*") if (folder / META).is_file() else ():
            path.unlink()


def _clear(folder: Path, share: Share) -> None:
    """What lies there is finished no more: the vectors, and this process's sums."""
    (folder / META).unlink(missing_ok=True)
    _finished(folder, share.rank).unlink(missing_ok=True)


def _partial(folder: Path, rank: int, layer: int) -> Path:
    return folder / f".sums_{rank}_{layer}.npy"


def _finished(folder: Path, rank: int) -> Path:
    return folder / f".sums_{rank}.json"


def _combine(
    request: ImportanceRequest, folder: Path, about: dict[str, Any], layers: tuple[int, ...], share: Share
) -> bool:
    """Add all processes' sums, in the order of their ranks, and write the vectors, once all have ended."""
    with locked(folder):
        if (folder / META).is_file():
            return True
        ended = [_finished(folder, rank) for rank in range(share.size)]
        notes = [read_object(path) if path.is_file() else {} for path in ended]
        if any(note.get("about") != about for note in notes):
            return False
        tokens = np.sum([note["tokens"] for note in notes], axis=0)
        kernel = KERNELS[request.kernel] if request.level == "total" else KERNELS["plain"]
        for path in folder.glob(f"*/layers.*.weight.{TYPES[request.kind]}"):  # of layers that are not asked for now
            path.unlink()
        for layer in layers:
            sums = sum(np.load(_partial(folder, rank, layer), allow_pickle=False) for rank in range(share.size))
            for number, key in enumerate(POINTS):
                for cluster in range(request.clusters):
                    place = folder / str(cluster)
                    place.mkdir(exist_ok=True)
                    vector = kernel(sums[number, cluster]) / max(tokens[cluster], 1)
                    file = place / f"layers.{layer}.mlp.{key}.weight.{TYPES[request.kind]}"
                    write_numbers(file, vector.astype(np.float32), overwrite=True)
        text = {"about": about, "tokens": tokens.tolist(), "loss": "summed over predicted tokens"}
        write_text(folder / META, json.dumps(text, indent=1) + "\n")
        for path in folder.glob(".sums_*"):
            path.unlink()
        return True
