# SPDX-License-Identifier: Apache-2.0
"""Hidden features of a dense model: what its feed-forward parts see, and what their neurons answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.json_text import read_object
from mindformers_ext.formats.atomic import write_text
from mindformers_ext.formats.disk import free_bytes
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.calibration import Calibration, Opened, opened
from mindformers_ext.jobs.experts.dense_model import TEMPLATE, template_kind
from mindformers_ext.jobs.experts.feature_files import (
    FORMATS,
    INPUTS,
    OUTPUTS,
    FeatureSink,
    features_folder,
    manifest,
    manifests,
)
from mindformers_ext.jobs.experts.probe import Needs, check_needs, forward, needs
from mindformers_ext.jobs.experts.ranks import Share, own_share
from mindformers_ext.jobs.experts.states import States

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """What is asked for. ``layers`` None: all. ``dry_run``: only say what it would take."""

    calibration: Calibration
    save_path: Path
    template: str = TEMPLATE
    layers: tuple[int, ...] | None = None
    save_interval: int = 1
    fmt: str = "pth"
    overwrite: bool = False
    dry_run: bool = False

    def check(self) -> str:
        """The matrix that the template names; ``UserError`` lists options that do not fit."""
        problems = Problems("options")
        problems.positive("--save_interval", self.save_interval)
        problems.one_of("--format", self.fmt, FORMATS)
        problems.raise_if_any()
        self.calibration.check()
        return template_kind(self.template)


@dataclass(frozen=True)
class FeatureReport:
    """What was written by this process; ``nbytes`` by all. ``layers`` 0: all were there already."""

    folder: Path
    tokens: int
    nbytes: int
    layers: int


def write_features(request: FeatureRequest, tell: Callable[[str], object] = lambda line: None) -> FeatureReport:
    """Write the features of this process's share of the rows. A killed run goes on where it was.

    Args:
        request: what is asked for.
        tell: gets lines for the user, the estimate before anything is computed.

    Raises:
        UserError: options, texts or a model that do not fit; too little memory or disk; other features in the folder.
    """
    kind, share = request.check(), own_share()
    with opened(request.calibration, share, not request.dry_run) as start:
        layers = start.model.check_layers(request.layers)
        folder = features_folder(request.save_path, start.model.name)
        about = _about(request, start, share)
        todo = _todo(folder, about, layers, share, request.overwrite)
        sink = _sink(request, start, kind, folder, share)
        spec = start.model.spec
        each = 2 * (spec.hidden_size + spec.intermediate_size)
        total = start.tokens * each * len(layers)
        wanted = needs(start.course, sink, len(layers), backward=False)
        for line in (*start.notes, *_estimate(start, wanted, each, len(layers), total, folder)):
            tell(line) if share.rank == 0 else None
        own = start.course.rows.tokens * each * len(todo)
        if request.dry_run or not todo:
            return FeatureReport(folder, start.tokens, total, 0)
        check_needs(wanted, folder, own * share.size)
        _pass(start, folder, sink, about, todo, layers, share, kind, request)
        return FeatureReport(folder, start.tokens, total, len(todo))


def _sink(request: FeatureRequest, start: Opened, kind: str, folder: Path, share: Share) -> FeatureSink:
    spec, asked = start.model.spec, request.calibration
    rows = min(asked.batch_size * request.save_interval, len(start.course.rows.ids))
    return FeatureSink(
        folder,
        kind,
        share.rank,
        request.save_interval,
        request.fmt,
        (spec.hidden_size, spec.intermediate_size),
        rows * asked.block_size,
    )


def _pass(
    start: Opened,
    folder: Path,
    sink: FeatureSink,
    about: dict[str, Any],
    todo: tuple[int, ...],
    layers: tuple[int, ...],
    share: Share,
    kind: str,
    request: FeatureRequest,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if request.overwrite:
        _clear(folder, about, todo, share)
    digest = start.course.rows.digest(json.dumps({**about, "todo": todo}, sort_keys=True))
    place = folder / f".states_{share.rank}"
    states = States(
        place, start.course.length, start.model.spec.hidden_size, digest, keep=False, anew=request.overwrite
    )
    if states.done("forward") == 0:
        _remove_old(folder, share, (OUTPUTS[kind],), [f"layer{layer}" for layer in todo])
    forward(start.course, states, sink, todo)
    done = sorted({*layers, *_done(folder, about, share.rank)})
    write_text(folder / manifest(share.rank), json.dumps({**about, "layers": done}, indent=1) + "\n")
    states.remove()


def _about(request: FeatureRequest, start: Opened, share: Share) -> dict[str, Any]:
    """What makes features the same: kept beside them."""
    asked = request.calibration
    return {
        "version": VERSION,
        "model": start.model.name,
        "weights": fingerprint(start.model.reader),
        "rows": start.course.rows.digest(""),
        "tokens": start.course.rows.tokens,
        "tokens_of_all": start.tokens,
        "rank": share.rank,
        "ranks": share.size,
        "template": request.template,
        "block_size": asked.block_size,
        "save_interval": request.save_interval,
        "format": request.fmt,
        **asked.computed(),
    }


def _done(folder: Path, about: dict[str, Any], rank: int) -> tuple[int, ...]:
    """The layers that an earlier run of the same has finished."""
    path = folder / manifest(rank)
    if not path.is_file():
        return ()
    found = read_object(path)
    same = all(found.get(key) == value for key, value in about.items())
    return tuple(int(layer) for layer in found.get("layers", ())) if same else ()


def _todo(
    folder: Path, about: dict[str, Any], layers: tuple[int, ...], share: Share, overwrite: bool
) -> tuple[int, ...]:
    """The layers that are left, with ``overwrite`` all; else features of something else are refused."""
    if overwrite:
        return layers
    path = folder / manifest(share.rank)
    done = _done(folder, about, share.rank)
    if path.is_file() and not done:
        raise UserError(
            f"'{folder}' holds other features (another model, text, template, engine, device or number of processes): "
            "choose another --save_path, or pass --overwrite"
        )
    started = (folder / f".states_{share.rank}").exists()
    if not path.is_file() and not started:
        mine = [file for name in (INPUTS, *OUTPUTS.values()) for file in (folder / name).glob(f"**/{share.rank}_*.*")]
        if mine:
            raise UserError(f"'{folder}' holds features of another tool: choose another --save_path, or --overwrite")
    return tuple(layer for layer in layers if layer not in done)


def _clear(folder: Path, about: dict[str, Any], todo: tuple[int, ...], share: Share) -> None:
    """Take away what was made otherwise, all layers of it; of the same the layers ``todo`` are no longer finished."""
    path = folder / manifest(share.rank)
    done = _done(folder, about, share.rank)
    for old in manifests(folder):  # of ranks that are no more
        number = old.stem.removeprefix("features_")
        if number.isdecimal() and int(number) >= share.size and int(number) % share.size == share.rank:
            old.unlink()
    left = [layer for layer in done if layer not in todo]
    if left:
        write_text(path, json.dumps({**about, "layers": left}, indent=1) + "\n")
        return
    path.unlink(missing_ok=True)
    if not done:
        _remove_old(folder, share, tuple(OUTPUTS.values()), ["layer*"])


def _remove_old(folder: Path, share: Share, outputs: tuple[str, ...], layers: list[str]) -> None:
    """Shards of these layers that this run does not write: its own older ones, and those of ranks that are no more."""
    for name in (INPUTS, *outputs):
        for file in [found for layer in layers for found in (folder / name).glob(f"{layer}/*_*.*")]:
            number = file.name.partition("_")[0]
            if number.isdecimal() and int(number) % share.size == share.rank and not file.is_symlink():
                file.unlink()


def _estimate(start: Opened, wanted: Needs, each: int, layers: int, total: int, folder: Path) -> list[str]:
    whole = start.model.spec.num_hidden_layers
    return [
        f"{start.rows} rows, {start.tokens} tokens; {each} bytes a token and layer, {each * whole} for all {whole} "
        f"layers of the model",
        f"features of {layers} layers: {total / 1e9:.3f} GB; besides {wanted.disk / 1e9:.3f} GB while it runs, a "
        f"process; disk free: {free_bytes(folder / 'file') / 1e9:.1f} GB",
        f"memory of a process: about {wanted.memory / 1e9:.2f} GB, for any number of layers",
    ]
