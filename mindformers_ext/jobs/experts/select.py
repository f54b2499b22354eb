# SPDX-License-Identifier: Apache-2.0
"""Fits the gates that choose experts, layer by layer, from hidden features on disk or while the model runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.formats.folder_lock import locked
from mindformers_ext.jobs.experts.dense_model import TEMPLATE, DenseModel, open_dense, template_kind
from mindformers_ext.jobs.experts.feature_files import LayerFeatures, check_features, features_rows, find_features
from mindformers_ext.jobs.experts.gate_files import SUMMARY, GateFiles, gates_folder
from mindformers_ext.jobs.experts.layer_data import Gathered, gather
from mindformers_ext.jobs.experts.layer_pool import AGAIN
from mindformers_ext.jobs.experts.probe import BASE
from mindformers_ext.jobs.experts.ranks import own_share
from mindformers_ext.jobs.experts.splits import open_split, split_sha
from mindformers_ext.jobs.items.map_items import Place, Work, map_items
from mindformers_ext.surgery.experts.split import LayerSplit
from mindformers_ext.surgery.experts.words import INITS, KINDS, OUTPUT_NORM, SCORED, TARGETS

if TYPE_CHECKING:
    from mindformers_ext.jobs.experts.calibration import Calibration

MOST = 1 << 18  # tokens of a layer that are held in memory, unless asked otherwise
MOST_WORKERS = 8
LAYERS_A_WORKER = 4


@dataclass(frozen=True, kw_only=True)
class SelectRequest:
    """What is asked for. ``features`` None: while the model runs, as ``calibration`` says (--stream). ``limit``: tokens
    of a layer's features that a gate is fitted to at most."""

    model_path: Path
    split_path: Path
    save_path: Path
    features: Path | None = None
    calibration: Calibration | None = None
    template: str = TEMPLATE
    criterion: str = "l2_norm"
    experts: int = 8
    selects: int = 2
    layers: tuple[int, ...] | None = None
    gate: str = "mlp"
    init: str = "ridge"
    softmax: bool = False
    lr: float = 1e-2
    epochs: int = 100
    batch: int = 1024
    patience: int = 15
    balance: float = 0.0
    noise: bool = False
    percent: float = 1.0
    damping: float = 0.01
    ridge_target: str = "chosen"
    reservoir: int = 1 << 16
    limit: int = MOST
    workers: int | None = None
    seed: int = 0
    allow_pickle: bool = False
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False

    def check(self) -> str:
        """The matrix that the template names; ``UserError`` lists options that do not fit."""
        problems = Problems("options")
        if (self.features is None) == (self.calibration is None):
            problems.add("features come from --hidden_features_path or, with --stream, from a run", "give one of them")
        problems.one_of("--select_criterion", self.criterion, (*SCORED, OUTPUT_NORM))
        problems.one_of("--gate", self.gate, KINDS)
        problems.one_of("--mlp_init_criterion", self.init, INITS)
        problems.one_of("--ridge_target", self.ridge_target, TARGETS)
        for name in ("experts", "selects", "epochs", "batch", "patience", "reservoir"):
            problems.positive(f"--{name if name not in ('experts', 'selects') else 'num_' + name}", getattr(self, name))
        problems.positive("--max_tokens", self.limit)
        if self.workers is not None:
            problems.positive("--workers", self.workers)
        if self.selects > self.experts > 0:
            problems.add(f"--num_selects {self.selects} of {self.experts} experts", f"choose at most {self.experts}")
        for name, value, fits in (
            ("--lr", self.lr, 0 < self.lr < 100),
            ("--balance_loss_lambda", self.balance, 0 <= self.balance < 1e6),
            ("--data_use_percent", self.percent, 0 < self.percent <= 1),
            ("--ridge_lambda", self.damping, 0 < self.damping < 1e6),
        ):
            if not fits:
                problems.add(f"{name} {value} is out of range", "see --help")
        problems.raise_if_any()
        return template_kind(self.template)


@dataclass(frozen=True)
class SelectReport:
    """What was fitted. ``layers``: those of this run; ``figures``: of all that lie in the folder."""

    folder: Path
    layers: tuple[int, ...]
    figures: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def select(request: SelectRequest, tell: Callable[[str], object] = lambda line: None) -> SelectReport:
    """Fit the gates that are left to fit, and write them with what was measured.

    Raises:
        UserError: options, a split, features or texts that do not fit; other gates in the folder.
    """
    kind = request.check()
    model = open_dense(request.model_path)
    try:
        layers = model.check_layers(request.layers)
        if request.features is not None:  # several processes divide the layers
            share = own_share()
            layers = layers[share.rank :: share.size]
        files = GateFiles(gates_folder(request.save_path, model.name, request.experts, request.gate), request.template)
        splits = {layer: layer_split(request, model, layer) for layer in layers}
        if request.features is not None:
            check_features(request.features, layers, request.template, fingerprint(model.reader))
            for layer in layers:
                find_features(request.features, kind, layer, request.allow_pickle)
        asked = _about(request, model)
        about = {layer: {**asked, "split": split_sha(split)} for layer, split in splits.items()}
        todo = files.todo(layers, about, request.overwrite)
        notes: list[str] = []
        if request.dry_run:
            return SelectReport(files.folder, todo, (), ())
        if request.calibration is not None:
            todo, notes = _from_model(request, model, {layer: splits[layer] for layer in todo}, files, about, tell)
        elif todo:
            notes += _from_files(request, model, todo, files, about, tell)
    finally:
        model.close()
    return _report(files, todo, notes, asked)


def layer_split(request: SelectRequest, model: DenseModel, layer: int) -> LayerSplit:
    """The split of one layer, which must have the model's width and the request's experts."""
    width = model.spec.intermediate_size
    return open_split(request.split_path, request.template, layer, request.experts, request.allow_pickle, width)


def worker_count(asked: int | None, layers: int, nbytes: int) -> int:
    """``asked`` processes, or by default one for a few layers, at most one a processor and as memory allows.

    What a process computes does not depend on memory, only how many there are.

    Raises:
        UserError: memory has no room for so many processes of ``nbytes``, or not for one.
    """
    cores, free = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
    most = max(1, free // nbytes)
    count = min(asked or min(cores, MOST_WORKERS, ceil(layers / LAYERS_A_WORKER), most), layers)
    if count * nbytes > free:
        raise UserError(
            f"{count} processes need about {count * nbytes / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: use "
            "fewer --workers, lower --max_tokens or --data_use_percent, or select with --stream"
        )
    return count


def fit_and_write(
    request: SelectRequest,
    model: DenseModel,
    layer: int,
    split: LayerSplit,
    found: Gathered,
    files: GateFiles,
    about: Mapping[str, Any],
) -> None:
    """One layer's gate from its tokens, and its files."""
    from mindformers_ext.surgery.experts.gate_fit import GateTraining
    from mindformers_ext.surgery.experts.gate_layer import GateWish, LayerTokens, fit_gate

    how = GateTraining(
        selects=request.selects,
        lr=request.lr,
        epochs=request.epochs,
        batch=request.batch,
        patience=request.patience,
        softmax=request.softmax,
        balance=request.balance,
        noise=request.noise,
        seed=request.seed + layer,
    )
    wish = GateWish(request.gate, request.init, how, request.damping, request.ridge_target)
    tokens = LayerTokens(found.x, found.scores, found.train, found.targets)
    rows = model.matrix(template_kind(request.template), layer)
    weights, figures = fit_gate(tokens, rows, split, wish)
    files.write(layer, weights, figures, about)


def _from_model(
    request: SelectRequest,
    model: DenseModel,
    splits: Mapping[int, LayerSplit],
    files: GateFiles,
    about: Mapping[int, dict[str, Any]],
    tell: Callable[[str], object],
) -> tuple[tuple[int, ...], list[str]]:
    """The layers of ``splits`` while the model runs; which this process has fitted, and notes."""
    from mindformers_ext.jobs.experts.select_stream import clean, stream

    if not splits:
        clean(files)
        return (), []
    fitted = stream(request, model, splits, files, about, tell)
    left = [layer for layer in splits if not files.done(layer, about[layer])]
    where = "other processes fit them; where none is at work any more, start the same again in all"
    return fitted, [f"the gates of layers {left} are not there yet: {where}"] if left else []


def _from_files(
    request: SelectRequest,
    model: DenseModel,
    todo: Sequence[int],
    files: GateFiles,
    about: Mapping[int, dict[str, Any]],
    tell: Callable[[str], object],
) -> list[str]:
    """Every layer from its shards, several at a time."""
    nbytes = _layer_bytes(request, model, todo[0])
    workers = worker_count(request.workers, len(todo), nbytes)
    tell(f"memory of a process: about {nbytes / 1e9:.2f} GB, for any number of layers; processes: {workers}")
    if request.overwrite:
        files.clear(todo, about)
    jobs = [(request, layer, files, about[layer]) for layer in todo]
    work = Work("select", _layer_from_files, open_dense, (request.model_path,), DenseModel.close, AGAIN)
    results = map_items(work, jobs, Place(workers), ordered=False)
    bar = tqdm(results, "gates", len(jobs), unit="layer", disable=request.quiet or None)
    return sorted({note for note in bar if note})[:1]


def _layer_bytes(request: SelectRequest, model: DenseModel, layer: int) -> int:
    """What a process holds at most: a layer's tokens twice (in parts, then together), a shard, and three matrices."""
    features = find_features(request.features or Path(), template_kind(request.template), layer, request.allow_pickle)
    shards = [x.stat().st_size + a.stat().st_size for x, a in zip(features.inputs, features.outputs, strict=True)]
    width, inner = model.spec.hidden_size, model.spec.intermediate_size
    tokens = min(request.limit, sum(path.stat().st_size for path in features.inputs) // (2 * width))
    return BASE + tokens * (2 * 2 * width + 16 * request.experts) + 3 * max(shards) + 3 * 4 * width * inner


def _layer_from_files(model: DenseModel, job: tuple[SelectRequest, int, GateFiles, dict[str, Any]]) -> str:
    """One layer, in this process or in one of several; returns a note."""
    request, layer, files, about = job
    kind = template_kind(request.template)
    split = layer_split(request, model, layer)
    features = _share(find_features(request.features or Path(), kind, layer, request.allow_pickle), request.percent)
    ridge = request.gate == "ridge"
    found = gather(features, model, layer, split, kind, request.criterion, ridge, request.limit)
    fit_and_write(request, model, layer, split, found, files, about)
    used = len(found.x)
    return f"gates were fitted to {used} of {found.there} tokens (--max_tokens)" if used < found.there else ""


def _share(features: LayerFeatures, percent: float) -> LayerFeatures:
    """The first files, as many as ``percent`` says, one at least."""
    count = max(1, int(len(features.inputs) * percent))
    return LayerFeatures(features.inputs[:count], features.outputs[:count], features.allow_pickle)


def _about(request: SelectRequest, model: DenseModel) -> dict[str, Any]:
    """What makes a gate the same: kept beside it."""
    words = ("template", "criterion", "experts", "selects", "gate", "init", "softmax", "lr", "epochs", "batch",
             "patience", "balance", "noise", "percent", "damping", "ridge_target", "seed")  # fmt: skip
    asked: dict[str, Any] = {word: getattr(request, word) for word in words}
    if request.calibration is not None:
        from mindformers_ext.jobs.experts.calibration import texts_of

        asked["stream"] = {"reservoir": request.reservoir, **request.calibration.computed()}
        asked["texts"] = texts_of(request.calibration)
    if request.features is not None:
        asked |= {"limit": request.limit, "texts": features_rows(request.features)}
    return asked | {"model": model.name, "weights": fingerprint(model.reader)}


def _report(files: GateFiles, todo: tuple[int, ...], notes: list[str], asked: Mapping[str, Any]) -> SelectReport:
    if not files.folder.is_dir():
        return SelectReport(files.folder, todo, (), tuple(notes))
    with locked(files.folder):  # another process may fit other layers
        found = _figures(files, asked)
        short = [{key: value for key, value in one.items() if key not in ("curve", "about")} for one in found]
        text = json.dumps({"about": dict(asked), "layers": short}, indent=1) + "\n"
        summary = files.folder / SUMMARY
        if not summary.is_file() or summary.read_text(encoding="utf-8") != text:
            from mindformers_ext.jobs.experts.gate_plot import plot_gates

            plot_gates(found, files.folder / "select.png")
            write_text(summary, text)  # comes last: what it says is drawn
    return SelectReport(files.folder, todo, found, tuple(notes))


def _figures(files: GateFiles, asked: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Of the layers there that were fitted as ``asked``."""
    return tuple(one for one in files.figures() if {**one.get("about", {}), **asked} == one.get("about"))
