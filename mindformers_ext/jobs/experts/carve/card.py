# SPDX-License-Identifier: Apache-2.0
"""The model card of a carved mixture: what it is, how it was made, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mindformers_ext.core.config.file import dump_yaml
from mindformers_ext.jobs.experts.carve.export import HOLD_GATES, PASSED, by_threshold, how_to_load, weight_words
from mindformers_ext.jobs.experts.carve.losses import CARVED, DENSE, MEANING, Judged
from mindformers_ext.jobs.experts.carve.request import MEASURED_ONLY, OURS, CarveRequest
from mindformers_ext.jobs.experts.dense_model import model_name
from mindformers_ext.jobs.experts.ladder_plot import plot_losses
from mindformers_ext.jobs.merge.sidecars import Card
from mindformers_ext.surgery.experts.carve.recipes import LayeredRecipe

CARD_COPY, PICTURE = "carving.yml", "ladder.png"


def card_of(request: CarveRequest, judged: Judged, figures: Mapping[str, float], measured: int) -> Card:
    """The card, whose first words say whether a static cut is better; ``measured``: tokens."""
    recipe, name = request.recipe, model_name(request.model)
    what = f"**{judged.verdict()}.**\n\nEvery layer's neurons are cut into {recipe.experts} groups of one size: "
    if isinstance(recipe, LayeredRecipe):
        what += f"{recipe.shared + recipe.active} are computed for a token. How many of them are the same for every "
        what += "token differs by layer (by_layer below), the others are chosen. "
    else:
        what += f"{recipe.shared} are computed for every token, {recipe.active} of the other "
        what += f"{recipe.experts - recipe.shared} are chosen. "
    if by_threshold(request):
        what += f"{PASSED}. "
    what += "Nothing was trained; "
    if request.form != MEASURED_ONLY:
        what += f"it is {how_to_load(request.form, request.output.folder)}; "
    if request.form not in (MEASURED_ONLY, OURS):
        what += f"{weight_words(figures)}; {HOLD_GATES}; "
    told = asdict(recipe) | {"model": name, "format": request.form, "measured_tokens": measured}
    return Card(
        method=recipe.method,
        models=(name,),
        base=None,
        config=dump_yaml(told),
        copy=CARD_COPY,
        what=f"{what}carved by the method",
        tags=("moe",),
        more=_table(judged),
    )


def _table(judged: Judged) -> str:
    lines = [
        f"## Loss on {int(judged.tokens.sum())} held-out tokens",
        "",
        "Nats per token; differences with standard errors over rows of text, paired.",
        "",
        "| way | loss | to dense | what is computed |",
        "|---|---|---|---|",
    ]
    for way in sorted(judged.losses, key=judged.mean):
        apart, error = judged.difference(way, DENSE)
        more = "" if way == DENSE else f"{apart:+.4f} ± {error:.4f}"
        lines.append(f"| {way} | {judged.mean(way):.4f} | {more} | {MEANING[way]} |")
    if has_picture(judged):
        lines += ["", f"![what each way loses to the dense model]({PICTURE})"]
    return "\n".join(lines) + "\n"


def has_picture(judged: Judged) -> bool:
    """Whether there is anything to compare."""
    return judged.rival() is not None


def draw(judged: Judged, folder: Path) -> None:
    """The ladder as PICTURE in ``folder``."""
    losses = {way: judged.mean(way) for way in judged.losses}
    errors = {way: judged.difference(way, DENSE)[1] for way in losses if way != DENSE}
    known = {way: error for way, error in errors.items() if not math.isnan(error)}
    plot_losses(losses, DENSE, CARVED, int(judged.tokens.sum()), folder / PICTURE, known)
