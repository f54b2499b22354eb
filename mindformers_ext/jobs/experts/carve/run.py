# SPDX-License-Identifier: Apache-2.0
"""Carve a dense model: estimate, pass, losses of what it is compared with, mixture and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_ext import __version__
from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import fresh_folder, write_text
from mindformers_ext.formats.fingerprint import fingerprint
from mindformers_ext.jobs.experts.carve.card import CARD_COPY, PICTURE, card_of, draw, has_picture
from mindformers_ext.jobs.experts.carve.cost import carving_needs, products, rate
from mindformers_ext.jobs.experts.carve.export import (
    HOLD_GATES,
    PASSED,
    SAVING,
    by_threshold,
    check_form,
    export,
    how_to_load,
    weight_words,
)
from mindformers_ext.jobs.experts.carve.layer_files import LayerFiles
from mindformers_ext.jobs.experts.carve.losses import CARVED, DENSE, Judged, ways
from mindformers_ext.jobs.experts.carve.request import AUTO, LOSSES, MEASURED_ONLY, OURS, CarveRequest
from mindformers_ext.jobs.experts.carve.shared import SharedLadder, choices, disk, products_of_search, search
from mindformers_ext.jobs.experts.carve.walk import Walker
from mindformers_ext.jobs.experts.probe import Tell, check_needs
from mindformers_ext.jobs.experts.texts import Ready, ready
from mindformers_ext.jobs.merge.output import MergeReport, check_output
from mindformers_ext.jobs.merge.sidecars import write_card
from mindformers_ext.surgery.experts.carve.recipes import STATIC, Recipe


@dataclass(frozen=True)
class CarveReport:
    """The losses, what was said of the layers, what was written (None: the losses alone), and what to say of it."""

    judged: Judged
    figures: Mapping[str, float]
    written: MergeReport | None
    said: tuple[str, ...]


def carve(request: CarveRequest, tell: Tell) -> CarveReport:
    """Carve, measure and write.

    Raises:
        UserError: anything wrong with options, model, text or output. Killed, it goes on where it was; what it has
            left stands in ``request.work``.
    """
    request.check()
    _check_place(request)
    with ready(request.model, request.texts) as start:
        request.check_model(start.model.spec)
        check_form(request, start.model)
        _estimate(start, request, tell)
        digest = digest_of(start)
        request.work.mkdir(parents=True, exist_ok=True)
        found = None
        if request.auto:
            found, alike = _shared(start, request, digest), request.form != MEASURED_ONLY
            tell(found.words(alike))
            request = replace(request, recipe=found.recipe(request.recipe, alike))
        recipes = ways(request.recipe, request.ladder)
        mark = sha256(f"{digest} {request.recipe}".encode()).hexdigest()
        files = LayerFiles(request.work / "layers", mark)
        judged = measure(start, recipes, request.work, digest, {CARVED: files}, request.texts.quiet)
        layers = range(start.model.spec.num_hidden_layers)
        by_layer = [dict(files.figures(layer)) for layer in layers]
        figures = summed(by_layer)
        about = {
            "tool": f"mindformers_ext {__version__}",
            "recipe": asdict(request.recipe),
            "format": request.form,
            "measured_tokens": start.measured.rows.tokens,
            "seed": request.recipe.seed,
            "figures": figures,
            "layers": by_layer,
            **({"shared_ladder": found.json()} if found else {}),
            **judged.json(),
        }
        said: tuple[str, ...] = ()

        def beside(folder: Path) -> None:
            write_text(folder / LOSSES, json.dumps(about, indent=1) + "\n")
            card = card_of(request, judged, figures, start.measured.rows.tokens)
            write_card(folder, request.output.folder.name, card)
            if has_picture(judged):
                draw(judged, folder)

        written = None
        if request.form == MEASURED_ONLY:
            with fresh_folder(request.output.folder, request.output.overwrite) as partial:
                beside(partial)
        else:
            written = export(request, start.model, files, beside)
            said = (how_to_load(request.form, request.output.folder),)
            said += () if request.form == OURS else (weight_words(figures), HOLD_GATES)
            said += (PASSED, SAVING) if by_threshold(request) else ()
    shutil.rmtree(request.work)
    return CarveReport(judged, figures, written, said)


def _shared(start: Ready, request: CarveRequest, digest: str) -> SharedLadder:
    """How many groups each layer's tokens should all pass."""
    layers = start.model.spec.num_hidden_layers
    with tqdm(total=2 * layers, unit="layer", disable=request.texts.quiet or None, mininterval=1.0) as bar:
        walker = Walker(start, request.work, digest, bar)
        walker.once(DENSE, None)
        bar.set_description_str(f"--shared {AUTO}", refresh=False)
        return search(walker, request.recipe)


def measure(
    start: Ready, recipes: Mapping[str, Recipe], folder: Path, digest: str, kept: Mapping[str, LayerFiles], quiet: bool
) -> Judged:
    """The losses of the dense model and of every recipe; those an earlier run has left in ``folder`` are taken.
    ``kept``: where a recipe's layers are kept."""
    layers = start.model.spec.num_hidden_layers
    with tqdm(total=(1 + len(recipes)) * layers, unit="layer", disable=quiet or None, mininterval=1.0) as bar:
        walker = Walker(start, folder, digest, bar)
        losses = {DENSE: walker.once(DENSE, None)}
        losses |= {name: walker.once(name, recipe, kept.get(name)) for name, recipe in recipes.items()}
    is_mixture = CARVED in recipes and recipes[CARVED].method not in STATIC
    return Judged(losses, np.maximum(start.judged.rows.lengths - 1, 0), is_mixture)


def digest_of(start: Ready) -> str:
    """Of the weights, both texts and how they are computed."""
    about = {**start.about(), "weights": fingerprint(start.model.reader), "judged": start.judged.rows.digest("")}
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def summed(layers: list[dict[str, float]]) -> dict[str, float]:
    """Figures of all layers: the largest, of ``weight_same`` the smallest, of errors and means the mean."""
    found: dict[str, float] = {}
    for name in layers[0] if layers else ():
        values = [figures[name] for figures in layers]
        if name.endswith("largest"):
            found[name] = max(values)
        elif name == "weight_same":
            found[name] = min(values)
        else:
            found[name] = float(np.mean(values))
    return found


def _check_place(request: CarveRequest) -> None:
    if request.form == MEASURED_ONLY:
        out = request.output
        held = {item.name for item in out.folder.iterdir()} if out.folder.is_dir() else set()
        if held and not out.overwrite or held - {LOSSES, "README.md", CARD_COPY, PICTURE} or out.folder.is_file():
            raise UserError(f"output '{out.folder}' exists: choose another path, or pass --overwrite for older losses")
    else:
        check_output(request.output, [request.model])
    if request.work.is_symlink() or request.work.exists() and not request.work.is_dir():
        raise UserError(f"'{request.work}' is no folder: a carving leaves there what it has done; remove it")


def _estimate(start: Ready, request: CarveRequest, tell: Tell) -> None:
    """Say what it takes, and refuse what does not fit."""
    wanted, recipes = carving_needs(start, request.recipe), ways(request.recipe, request.ladder)
    searched = ""
    seconds = sum(products(start, recipe) for recipe in recipes.values())
    if request.auto:
        more, tried = products_of_search(start, request.recipe), choices(request.recipe)
        wanted = replace(wanted, disk=wanted.disk + disk(start, tried))
        seconds += more
        searched = f" (of them {more / seconds:.0%} for --shared {AUTO}: {len(tried)} S in every layer)"
    seconds /= rate()
    place = next(folder for folder in request.work.absolute().parents if folder.is_dir())
    size = sum(info.nbytes for info in start.model.reader.infos.values())
    check_needs(wanted, place, outputs=2 * size)
    spec = start.model.spec
    tell(
        f"{spec.num_hidden_layers} layers, {start.measured.rows.tokens} tokens measured, "
        f"{start.judged.rows.tokens} judge, {1 + len(recipes)} ways: about "
        f"{max(seconds / 60, 0.1):.1f} minutes{searched}, {wanted.memory / 1e9:.2f} GB of memory, "
        f"{(wanted.disk + 2 * size) / 1e9:.2f} GB of disk; "
        f"killed, it goes on by what stands in '{request.work.name}' beside the output"
    )
